"""The tensors of a checkpoint that belong to parameters, wherever in it they are.

A callback may keep averages of weights; such a tensor has a key that is a parameter's name, or ends in one, and the shape of the
rank's part of it.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lightning_ted.collectives.primitives import all_extremes
from lightning_ted.errors import CheckpointError
from lightning_ted.layout import ParamLayout
from lightning_ted.mesh import TEDMesh

#: What becomes of one tensor: where it stands in the checkpoint, the tensor, its layout.
Visit = Callable[[str, Tensor, ParamLayout], Any]


class Names:
    """How the parameters and buffers of a module lie, by name.

    Args:
        module: The module whose names checkpoints use.
        layouts: How its parameters and buffers are cut, by qualified name.

    """

    def __init__(self, module: nn.Module, layouts: Mapping[str, ParamLayout]) -> None:
        named = [
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        ]
        # By object, so that every name of a tied weight is found.
        self._layout_of = {id(tensor): layouts[name] for name, tensor in named if name in layouts}
        self._by_name = {name: self._layout_of.get(id(tensor)) for name, tensor in named}
        self._parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        self._name_of = {id(tensor): name for name, tensor in reversed(named)}
        parameters = [p for p in module.parameters() if id(p) in self._layout_of]
        #: Those of all parameters, and of those that are trained, in order.
        self._orders = [
            [self._layout_of[id(p)] for p in parameters],
            [self._layout_of[id(p)] for p in parameters if p.requires_grad],
        ]
        self._cut_shapes = {
            layout.local_shape: name for name, layout in layouts.items() if layout.cuts and len(layout.global_shape) > 1
        }
        #: Where :meth:`visit` has found tensors that look like parts of parameters, and could not tell of which.
        self.unnamed: list[str] = []

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def of(self, parameter: Tensor) -> ParamLayout | None:
        """The layout of a parameter, if it has one."""
        return self._layout_of.get(id(parameter))

    def known(self, parameter: Parameter) -> tuple[str, ParamLayout]:
        """The (first) name and the layout of a parameter of the module."""
        name = self._name_of[id(parameter)]
        return name, self._layout_of[id(parameter)]

    def exactly(self, name: str) -> ParamLayout | None:
        """The layout of what has this qualified name."""
        return self._by_name.get(name)

    def find(self, key: str) -> ParamLayout | None:
        """The layout for a key that is a qualified name, or ends in one; the longest name wins."""
        name = self._match(key)
        return None if name is None else self._by_name[name]

    def is_parameter(self, key: str) -> bool:
        """Whether such a key is of a parameter, of which replicas are equal; buffers of data ranks may differ."""
        return self._match(key) in self._parameters

    def _match(self, key: str) -> str | None:
        # Names that are not cut are found too: `teacher.head.weight` must not be taken for `head.weight`.
        while key not in self._by_name:
            _, dot, key = key.partition(".")
            if not dot:
                return None
        return key

    def visit(self, checkpoint: Mapping[str, Any], visit: Visit, without: tuple[str, ...] = ()) -> dict[str, Any]:
        """A checkpoint with every tensor of which a layout is found replaced by what ``visit`` returns.

        Args:
            checkpoint: The checkpoint, which is not changed.
            visit: Called for each such tensor, in order.
            without: Keys of the checkpoint to leave as they are.

        """
        result = copy.copy(dict(checkpoint))
        for key, value in checkpoint.items():
            if key not in without:
                result[key] = self._visit(str(key), key, value, visit)
        return result

    def _visit(self, path: str, key: object, value: Any, visit: Visit) -> Any:
        if isinstance(value, Tensor):
            layout = self.find(key) if isinstance(key, str) else None
            if layout is not None:
                return visit(path, value, layout)
            if tuple(value.shape) in self._cut_shapes and not (isinstance(key, str) and self._match(key)):
                self.unnamed.append(path)
            return value
        if isinstance(value, dict):
            changed = {k: self._visit(f"{path}.{k}", k, item, visit) for k, item in value.items()}
            if all(changed[k] is item for k, item in value.items()):
                return value
            # `copy` keeps the class and its attributes: a state dict carries its version in one.
            result = copy.copy(value)
            for k, item in changed.items():
                result[k] = item
            return result
        if type(value) not in (list, tuple):
            return value
        order = self._in_order(value)
        if order is not None:
            items = [visit(f"{path}.{i}", *pair) for i, pair in enumerate(zip(value, order, strict=True))]
        else:
            items = [self._visit(f"{path}.{i}", i, item, visit) for i, item in enumerate(value)]
        return value if all(a is b for a, b in zip(items, value, strict=True)) else type(value)(items)

    def _in_order(self, values: Sequence[Any]) -> list[ParamLayout] | None:
        """The layouts of tensors without names that are, by their shapes, one for each parameter in order."""
        if not values or not all(isinstance(value, Tensor) for value in values):
            return None
        shapes = [tuple(value.shape) for value in values]
        for layouts in self._orders:
            local, whole = [layout.local_shape for layout in layouts], [layout.global_shape for layout in layouts]
            if shapes in (local, whole):
                return layouts
        return None


def require_same(found: Sequence[str], mesh: TEDMesh, device: torch.device) -> None:
    """See that every rank has found the same tensors. A collective.

    Args:
        found: What this rank has found, each described.
        mesh: The mesh.
        device: Where collectives take place.

    Raises:
        CheckpointError: On every rank, if one has found others.

    """
    # Seven bytes: a whole number of 64 bits whose negative is one, too.
    digest = int.from_bytes(hashlib.blake2b("\n".join(found).encode(), digest_size=7).digest(), "big")
    # Decided by what every rank has seen, so that all of them raise and none is left waiting.
    if torch.equal(*all_extremes(torch.tensor([digest], device=device), mesh.axis("world"))):
        return
    raise CheckpointError(
        "The ranks' checkpoints hold different sharded tensors, so they cannot be joined. HINT: hooks such as "
        "`on_save_checkpoint` see this rank's parts and must add and remove the same keys on every rank. This rank's: "
        + ", ".join(found[:8])
        + (", ..." if len(found) > 8 else "")
    )
