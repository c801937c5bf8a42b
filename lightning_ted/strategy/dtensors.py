"""Modules that their user has parallelized by torch's ``parallelize_module``, as for Lightning's ModelParallelStrategy.

Note [DTensors are made anew in each forward]
What ``parallelize_module`` leaves behind are hooks, and parameters that are DTensors. The hooks stay as they are. A DTensor
parameter gives way to a plain one of the same name, this rank's shard, so that gradients, optimizer, norm, checkpoints and
callbacks see what they see of every other module. Only the module itself still reads a DTensor: its class becomes a subclass,
on which the name is a property that wraps the shard, and torch's own operators do the rest. The backward of the wrapping
brings the gradient to the placement of the parameter: a replicated one gets its whole gradient on each tensor rank, also where
each of them saw some of the tokens, so it is reduced over the data axis as any dense one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from lightning_ted.collectives.primitives import broadcast_
from lightning_ted.errors import LayoutError, PlanError, UnsupportedError
from lightning_ted.layout import Cut
from lightning_ted.mesh import TEDMesh
from lightning_ted.moe.expert_parallel import expert_parallel_layers

_VIEWS = "_ted_dtensor_views"
_BASE = "_ted_dtensor_base"


@dataclass(frozen=True)
class _View:
    """How a shard is wrapped; copies of its module share it, because process groups cannot be copied."""

    mesh: DeviceMesh
    placement: Placement

    def __deepcopy__(self, memo: dict[int, Any]) -> _View:
        return self

    def of(self, local: Tensor) -> DTensor:
        return DTensor.from_local(local, self.mesh, (self.placement,), run_check=False)


@dataclass
class Unwrapped:
    """What :func:`unwrap` found.

    Attributes:
        cuts: How each parameter that was a DTensor is cut, by qualified name; replicated ones are not cut.
        shapes: Their global shapes.
        views: Of each module, how its parameters are to be wrapped, by their names in it.

    """

    cuts: dict[str, tuple[Cut, ...]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    views: list[tuple[nn.Module, dict[str, _View]]] = field(default_factory=list)


def is_parallelized(module: nn.Module) -> bool:
    """Whether ``parallelize_module`` has made parameters of ``module`` or of one below it DTensors."""
    return any(
        _VIEWS in child.__dict__ or any(isinstance(tensor, DTensor) for tensor in child._parameters.values())
        for child in module.modules()
    )


def unwrap(module: nn.Module, mesh: TEDMesh, device: torch.device | None) -> Unwrapped:
    """Replace each DTensor parameter by this rank's shard; replicas get the values of the first data-parallel rank.

    One without storage, on the meta device, is replaced by a whole one without storage.

    Args:
        module: The LightningModule.
        mesh: The strategy's mesh.
        device: Where the shards are to live; None leaves them where they are.

    Raises:
        UnsupportedError: For modules of ``fully_shard``, for DTensors on another mesh than the strategy's tensor axis, for
            placements other than ``Shard`` and ``Replicate``, for parameters of MoE layers, and for modules that have been
            parallelized twice.
        LayoutError: For shards of different lengths.

    """
    found = Unwrapped()
    local_of: dict[int, nn.Parameter] = {}
    layers = tuple(expert_parallel_layers(module))
    for prefix, child in module.named_modules():
        if isinstance(child, FSDPModule):
            raise UnsupportedError(
                f"'{prefix}' ({type(child).__name__}) has been sharded by `fully_shard`; leave the call out. `TEDStrategy` "
                "does the data parallelism itself, and shards the optimizer's state over its ranks."
            )
        views: dict[str, _View] = {}
        for leaf, tensor in list(child._parameters.items()):
            if not isinstance(tensor, DTensor):
                continue
            name = f"{prefix}.{leaf}" if prefix else leaf
            _refuse_repeated(name, leaf, child, layers)
            placement = _placement(name, tensor, mesh)
            if id(tensor) not in local_of:
                local_of[id(tensor)] = _local(tensor, placement, mesh, device)
            found.cuts[name] = _cuts(name, tensor, placement)
            found.shapes[name] = tuple(tensor.shape)
            views[leaf] = _View(mesh.dense["tensor_parallel"], placement)
            child._parameters[leaf] = local_of[id(tensor)]
        if views:
            found.views.append((child, views))
    return found


def wrap(found: Unwrapped) -> None:
    """Let modules read DTensors again where they read parameters that :func:`unwrap` has replaced."""
    for module, views in found.views:
        merged = {**module.__dict__.get(_VIEWS, {}), **views}
        module.__dict__[_VIEWS] = merged
        base = type(module).__dict__.get(_BASE, type(module))
        module.__class__ = _reading_dtensors(base, tuple(sorted(merged)))


def refuse_in_plan(module: nn.Module, found: Unwrapped, styles: Mapping[str, object]) -> None:
    """Refuse a plan that names what has been parallelized by hand.

    Raises:
        PlanError: If there is such a name.

    """
    handmade = {id(child) for child in module.modules() if _VIEWS in child.__dict__}
    handmade |= {id(child) for child, _ in found.views}
    for name in styles:
        parent, _, leaf = name.rpartition(".")
        holder = module.get_submodule(parent)
        target = getattr(holder, leaf) if leaf not in holder._parameters else holder
        if id(target) in handmade:
            raise PlanError(
                f"'{name}' has been parallelized by `parallelize_module`, and `tensor_parallel_plan` names it too (style "
                f"'{getattr(styles[name], 'name', styles[name])}'). Leave it out of one of them; `tensor_parallel_plan={{}}` "
                "is a plan that names nothing."
            )


def _refuse_repeated(name: str, leaf: str, module: nn.Module, layers: tuple[str, ...]) -> None:
    for layer in layers:
        if name.startswith(f"{layer}." if layer else ""):
            raise UnsupportedError(
                f"'{name}' is a DTensor, but belongs to the MoE layer '{layer}', which `TEDStrategy` shares out itself. Leave "
                "the layer out of `parallelize_module`; `expert_tensor_parallel_size` cuts its experts."
            )
    if leaf in module.__dict__.get(_VIEWS, {}):
        raise UnsupportedError(
            f"'{name}' has been parallelized twice. `configure_model` is called for every `fit`, `validate`, `test` and "
            "`predict`: return from it at once when the module has been parallelized before."
        )


def _placement(name: str, tensor: DTensor, mesh: TEDMesh) -> Placement:
    if tensor.device_mesh != mesh.dense["tensor_parallel"]:
        raise UnsupportedError(
            f"'{name}' is a DTensor on {tensor.device_mesh}; `TEDStrategy` takes those on "
            '`self.device_mesh["tensor_parallel"]` only. Data parallelism is its own.'
        )
    (placement,) = tensor.placements
    if type(placement) not in (Shard, Replicate):
        raise UnsupportedError(
            f"'{name}' is a DTensor with the placement {placement!r}; `TEDStrategy` takes `Shard(dim)` and `Replicate()`."
        )
    if isinstance(placement, Shard):
        placement = Shard(placement.dim % tensor.dim())
        length, degree = tensor.shape[placement.dim], mesh.topology.tensor
        if length % degree:
            raise LayoutError(
                f"dimension {placement.dim} of '{name}' (length {length}) cannot be cut over `tensor_parallel_size={degree}` "
                f"ranks: {length} is not a multiple of {degree}. Leave it out of `parallelize_module`, or choose another size."
            )
    return placement


def _cuts(name: str, tensor: DTensor, placement: Placement) -> tuple[Cut, ...]:
    if not isinstance(placement, Shard):
        return ()
    return (Cut(placement.dim, "tensor", tensor.device_mesh.size(), (tensor.shape[placement.dim],)),)


def _local(tensor: DTensor, placement: Placement, mesh: TEDMesh, device: torch.device | None) -> nn.Parameter:
    if tensor.is_meta:
        return nn.Parameter(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), tensor.requires_grad)
    with torch.no_grad():
        shard = tensor.to_local()
    # A copy, because the shard may be a view of the whole tensor.
    shard = shard.to(device or shard.device).clone(memory_format=torch.contiguous_format)
    return nn.Parameter(broadcast_(shard, mesh.axis("data")), tensor.requires_grad)


@cache
def _reading_dtensors(base: type[nn.Module], leaves: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of ``base``; the same one for all modules of a class, which may be compared by their types."""
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__, _BASE: base}
    return type(base.__name__, (base,), {**names, **{leaf: property(_reader(leaf)) for leaf in leaves}})


def _reader(leaf: str) -> Callable[[nn.Module], Tensor | None]:
    def read(self: nn.Module) -> Tensor | None:
        local = self._parameters[leaf]
        return None if local is None else self.__dict__[_VIEWS][leaf].of(local)

    return read
