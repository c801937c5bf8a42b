"""One plain ``.ckpt`` file: parts are joined when it is written and cut again when it is read.

Everything in between, the hooks of modules and callbacks included, sees this rank's parts. So the file is the one that one
process would have written, and any strategy, any layout and ``load_from_checkpoint`` can read it.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_ted.checkpoint.optimizer_state import Join, gather_state
from lightning_ted.collectives.primitives import all_extremes
from lightning_ted.collectives.whole import gather_whole
from lightning_ted.errors import CheckpointError
from lightning_ted.layout import ParamLayout
from lightning_ted.mesh import TEDMesh
from lightning_ted.optim.sharded import ShardedOptimizer

OPTIMIZER_STATES = "optimizer_states"

#: What becomes of one tensor that is cut: where it stands in the checkpoint, the tensor, its layout.
Visit = Callable[[str, Tensor, ParamLayout], Tensor]


@contextmanager
def reading(path: object) -> Iterator[None]:
    """Name the file where reading it fails.

    Raises:
        CheckpointError: If the file is empty, truncated or no checkpoint.

    """
    try:
        yield
    except (EOFError, UnpicklingError, RuntimeError) as error:
        raise CheckpointError(
            f"'{path}' cannot be read as a checkpoint ({str(error).splitlines()[0] if str(error) else 'it is empty'}). It may be "
            "truncated, damaged or something else; use an older one."
        ) from error


class SingleFile:
    """The single-file form of one module's checkpoints.

    Args:
        module: The module whose names the checkpoint uses.
        layouts: How its parameters and buffers are cut, by qualified name.
        mesh: Where this rank's parts lie.
        device: Where collectives take place.

    """

    def __init__(
        self, module: nn.Module, layouts: Mapping[str, ParamLayout], mesh: TEDMesh, device: torch.device
    ) -> None:
        self._mesh = mesh
        self._device = device
        named = [
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        ]
        # By object, so that every name of a tied weight is found.
        self._layout_of = {id(tensor): layouts[name] for name, tensor in named if name in layouts}
        self._by_name = {name: self._layout_of.get(id(tensor)) for name, tensor in named}

    def joined(
        self,
        checkpoint: dict[str, Any],
        optimizers: Sequence[Optimizer],
        keep: bool,
        master_of: Callable[[Tensor], Tensor | None] = lambda _: None,
    ) -> dict[str, Any]:
        """The checkpoint with full tensors. A collective: every rank calls it.

        Args:
            checkpoint: This rank's checkpoint, which is not changed.
            optimizers: The optimizers whose states it holds, in order.
            keep: Whether this rank wants the result (the one that writes); others get an incomplete one.
            master_of: This rank's part of the master weights for a tensor that is a working weight, else None. May be a
                collective.

        Raises:
            CheckpointError: On every rank, if the ranks' checkpoints have different keys.

        """
        found: list[str] = []

        def note(path: str, tensor: Tensor, layout: ParamLayout) -> Tensor:
            if tuple(tensor.shape) == layout.local_shape:
                found.append(f"{path} {tuple(tensor.shape)} {tensor.dtype}")
            return tensor

        def join(path: str, tensor: Tensor, layout: ParamLayout) -> Tensor:
            if tuple(tensor.shape) != layout.local_shape:
                return tensor
            master = master_of(tensor)
            return self._join(tensor if master is None else master, layout, keep)

        self._visit(checkpoint, note)
        self._check_same(found)
        result = self._visit(checkpoint, join)
        if OPTIMIZER_STATES in checkpoint:
            result[OPTIMIZER_STATES] = [
                gather_state(optimizer, state, self._join_state(keep), keep)
                if isinstance(optimizer, ShardedOptimizer)
                else state
                for state, optimizer in zip(checkpoint[OPTIMIZER_STATES], optimizers, strict=True)
            ]
        return result

    def _join(self, tensor: Tensor, layout: ParamLayout, keep: bool) -> Tensor:
        if not layout.cuts:
            # A file would hold all of the memory that a view looks at.
            shares = tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()
            return tensor.clone() if keep and shares else tensor
        full = gather_whole(tensor.detach().to(self._device), layout, self._mesh)
        return full.cpu() if keep else tensor

    def _join_state(self, keep: bool) -> Join:
        def join(parameter: Parameter, part: Tensor) -> Tensor | None:
            full = self._join(part, self._layout_of[id(parameter)], keep)
            return full.cpu() if keep else None

        return join

    def cut(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint as read from a file with this rank's parts, but for the optimizers' states.

        Those are cut by :meth:`cut_optimizer_state`, once the optimizers are there.
        """
        return self._visit(checkpoint, lambda _, tensor, layout: self._cut(tensor, layout))

    def cut_optimizer_state(self, state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
        """One optimizer's state with this rank's parts."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        indices = [index for group in state.get("param_groups", []) for index in group["params"]]
        layouts = {
            index: self._layout_of.get(id(parameter)) for index, parameter in zip(indices, parameters, strict=False)
        }
        result: dict[Any, Any] = {}
        for index, entries in state.get("state", {}).items():
            layout = layouts.get(index)
            if layout is None or not layout.cuts or not isinstance(entries, dict):
                result[index] = entries
                continue
            result[index] = {
                name: self._cut(entry, layout) if isinstance(entry, Tensor) else entry
                for name, entry in entries.items()
            }
        return {**state, "state": result} if "state" in state else state

    def _cut(self, tensor: Tensor, layout: ParamLayout) -> Tensor:
        if not layout.cuts or tuple(tensor.shape) != layout.global_shape:
            return tensor
        index: dict[str, int] = {cut.axis: self._mesh.axis(cut.axis).rank for cut in layout.cuts}
        # A copy, as a view would keep the full tensor in memory.
        return layout.part(tensor, index).clone(memory_format=torch.contiguous_format)

    def _check_same(self, found: list[str]) -> None:
        # Seven bytes: a whole number of 64 bits whose negative is one, too.
        digest = int.from_bytes(hashlib.blake2b("\n".join(found).encode(), digest_size=7).digest(), "big")
        # Decided by what every rank has seen, so that all of them raise and none is left waiting.
        if torch.equal(*all_extremes(torch.tensor([digest], device=self._device), self._mesh.axis("world"))):
            return
        raise CheckpointError(
            "The ranks' checkpoints hold different sharded tensors, so they cannot be joined. HINT: hooks such as "
            "`on_save_checkpoint` see this rank's parts and must add and remove the same keys on every rank. This rank's: "
            + ", ".join(found[:8])
            + (", ..." if len(found) > 8 else "")
        )

    def _visit(self, checkpoint: dict[str, Any], visit: Visit) -> dict[str, Any]:
        """All but the optimizers' states."""
        result = copy.copy(checkpoint)
        for key, value in checkpoint.items():
            if key != OPTIMIZER_STATES:
                result[key] = self._visit_value(str(key), key, value, visit)
        return result

    def _visit_value(self, path: str, key: object, value: Any, visit: Visit) -> Any:
        if isinstance(value, Tensor):
            layout = self._find(key) if isinstance(key, str) else None
            return value if layout is None else visit(path, value, layout)
        if isinstance(value, dict):
            pairs = list(value.items())
        elif type(value) is list:
            pairs = list(enumerate(value))
        else:
            return value
        changed = {k: self._visit_value(f"{path}.{k}", k, item, visit) for k, item in pairs}
        if all(changed[k] is item for k, item in pairs):
            return value
        # `copy` keeps the class and its attributes: a state dict carries its version in one.
        result = copy.copy(value)
        for k, item in changed.items():
            result[k] = item
        return result

    def _find(self, key: str) -> ParamLayout | None:
        """The layout for a key that is a qualified name, or ends in one; the longest name wins.

        Names that are not cut are found too: ``teacher.head.weight`` must not be taken for ``head.weight``.
        """
        while True:
            if key in self._by_name:
                return self._by_name[key]
            _, dot, key = key.partition(".")
            if not dot:
                return None
