"""Cutting a module in place: each tensor is taken from rank 0, cut, and the rest forgotten before the next one.

Note [Why parameters are cut in place]
``parameter.data`` is replaced by this rank's part, so the ``Parameter`` object stays: optimizers that were made
earlier, tied names, frozen flags and callbacks that hold parameters stay valid. How it was cut is kept by qualified
name in a record on the LightningModule, not on the parameter, whose attributes do not survive a copy.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_ted.collectives.primitives import broadcast_
from lightning_ted.errors import LayoutError, PlanError, UnsupportedError
from lightning_ted.layout import Cut, Family, ParamLayout
from lightning_ted.mesh import TEDMesh
from lightning_ted.moe.axes import MoEAxes
from lightning_ted.moe.experts import Experts
from lightning_ted.strategy.sizes import module_styles, moe_layers
from lightning_ted.tensor_parallel.apply import PlanResult, apply_plan, find_stacks
from lightning_ted.topology import Topology


@dataclass(frozen=True)
class PartitionOptions:
    """What the strategy's arguments say about cutting.

    Attributes:
        plan: Tensor-parallel plan.
        sequence_parallel: Split activations over tokens between tensor-parallel regions.
        duplicate_token_dropping: Tensor ranks dispatch only their share of the tokens.

    """

    plan: Literal["auto"] | Mapping[str, str] = "auto"
    sequence_parallel: bool = False
    duplicate_token_dropping: bool = True


@dataclass
class PartitionRecord:
    """How a module was cut.

    Attributes:
        topology: For which arrangement of ranks.
        options: With which arguments.
        layouts: Layout of every parameter and buffer, by qualified name.
        partial: Names below which gradients are summed over the tensor axis.
        styled: Names that a plan has been applied to.

    """

    topology: Topology
    options: PartitionOptions
    layouts: dict[str, ParamLayout] = field(default_factory=dict)
    partial: set[str] = field(default_factory=set)
    styled: set[str] = field(default_factory=set)


def partition_module(
    module: nn.Module,
    mesh: TEDMesh,
    options: PartitionOptions,
    device: torch.device | None = None,
    complete: bool = True,
) -> dict[str, ParamLayout]:
    """Cut what has not been cut yet.

    Args:
        module: The LightningModule.
        mesh: The mesh.
        options: What to cut, and how.
        device: Where the parts are to live; None leaves them where the tensors are.
        complete: False while the module has layers still to build.

    Returns:
        The layout of every parameter and persistent or other buffer, by qualified name; tied names each have one.

    Raises:
        PlanError, LayoutError: If the plan does not fit the module.
        UnsupportedError: For DTensor parameters, and for meta tensors that nothing can initialise.

    """
    record = module.__dict__.setdefault("_ted_partition", PartitionRecord(mesh.topology, options))
    if record.topology != mesh.topology or record.options != options:
        raise LayoutError(
            f"{type(module).__name__} has been cut for {record.topology}, {record.options} and cannot be cut again for "
            f"{mesh.topology}, {options}. Build a new module, and load a checkpoint into it to keep the weights."
        )
    result = _mark_plan(module, mesh, options, record, complete)
    cuts = result.cuts | _mark_experts(module, mesh, options, record, find_stack_names(module, options, complete))
    record.partial |= result.partial
    if all(name in record.layouts for name, _ in _tensors(module)):
        return record.layouts
    seed = _common_seed(mesh, device)
    placed: dict[int, ParamLayout] = {id(t): record.layouts[n] for n, t in _tensors(module) if n in record.layouts}
    for prefix, child in module.named_modules():
        path = f"{prefix}." if prefix else ""
        if any(tensor.is_meta for _, tensor in _own_tensors(child)):
            _materialise(child, prefix, seed, device)
        for leaf, tensor in _own_tensors(child):
            name = path + leaf
            if id(tensor) in placed:
                _check_tied(name, placed[id(tensor)], cuts, record)
                record.layouts[name] = replace(placed[id(tensor)], name=name)
                continue
            layout = _layout(name, tensor, cuts.get(name, ()), record.partial, mesh.topology)
            _place(tensor, layout, mesh, device)
            placed[id(tensor)] = record.layouts[name] = layout
    for prefix, child in module.named_modules(remove_duplicate=False):
        for leaf, tensor in _own_tensors(child):
            name = f"{prefix}.{leaf}" if prefix else leaf
            record.layouts.setdefault(name, replace(placed[id(tensor)], name=name))
    return record.layouts


def find_stack_names(module: nn.Module, options: PartitionOptions, complete: bool) -> list[str]:
    """Names of the block stacks whose activations are split over tokens."""
    if not options.sequence_parallel:
        return []
    return list(find_stacks(module, module_styles(module, options.plan, complete)))


def _mark_plan(
    module: nn.Module, mesh: TEDMesh, options: PartitionOptions, record: PartitionRecord, complete: bool
) -> PlanResult:
    styles = module_styles(module, options.plan, complete)
    for layer in moe_layers(module):
        for name in styles:
            if name == layer or name.startswith(f"{layer}."):
                raise PlanError(
                    f"`tensor_parallel_plan` names '{name}', a part of MoE layer '{layer}', which `expert_tensor_parallel_size` "
                    "cuts; leave it out of the plan."
                )
    fresh = {name: style for name, style in styles.items() if name not in record.styled}
    record.styled |= set(fresh)
    return apply_plan(module, fresh, mesh.axis("tensor"), options.sequence_parallel)


def _mark_experts(
    module: nn.Module, mesh: TEDMesh, options: PartitionOptions, record: PartitionRecord, stacks: list[str]
) -> dict[str, tuple[Cut, ...]]:
    """Give the MoE layers their axes; returns the cuts of their experts."""
    cuts: dict[str, tuple[Cut, ...]] = {}
    for name, layer in moe_layers(module).items():
        if layer.axes is not None:
            continue
        layer.axes = MoEAxes(
            world=mesh.axis("world"),
            data=mesh.axis("data"),
            tensor=mesh.axis("tensor"),
            expert=mesh.axis("expert"),
            expert_tensor=mesh.axis("expert_tensor"),
            drop_duplicates=options.duplicate_token_dropping,
            sequence_split=mesh.topology.tensor > 1 and any(name.startswith(f"{stack}.") for stack in stacks),
        )
        if layer.axes.tokens_are_split:
            record.partial.add(f"{name}.router")
        layer.experts.tensor_axis = mesh.axis("expert_tensor")
        cuts.update(_expert_cuts(f"{name}.experts", layer.experts, mesh.topology))
    return cuts


def _expert_cuts(prefix: str, experts: Experts, topology: Topology) -> dict[str, tuple[Cut, ...]]:
    count, width, hidden = experts.num_experts, experts.d_model, experts.d_ff
    over = Cut(0, "expert", topology.expert, (count,))
    blocks = (hidden, hidden) if experts.activation == "swiglu" else (hidden,)
    degree = topology.expert_tensor
    return {
        f"{prefix}.{experts.up_name}": (over, Cut(1, "expert_tensor", degree, blocks)),
        f"{prefix}.{experts.up_name}_bias": (over, Cut(1, "expert_tensor", degree, blocks)),
        f"{prefix}.down_proj": (over, Cut(2, "expert_tensor", degree, (hidden,))),
        # Cut over its features, not kept whole: added once however many shards there are.
        f"{prefix}.down_proj_bias": (over, Cut(1, "expert_tensor", degree, (width,))),
    }


def _layout(name: str, tensor: Tensor, cuts: tuple[Cut, ...], partial: set[str], topology: Topology) -> ParamLayout:
    family: Family = "dense"
    if any(cut.axis == "expert" for cut in cuts):
        family = "expert"
    elif not cuts and any(name == marked or name.startswith(f"{marked}.") for marked in partial):
        family = "partial"
    cuts = tuple(cut for cut in cuts if cut.degree > 1)
    copies = topology.world_size
    for cut in cuts:
        copies //= cut.degree
    return ParamLayout(name, tuple(tensor.shape), cuts, family, copies)


def _place(tensor: Tensor, layout: ParamLayout, mesh: TEDMesh, device: torch.device | None) -> None:
    """Replace a whole tensor by this rank's part of rank 0's."""
    full = tensor.data if device is None else tensor.data.to(device)
    full = broadcast_(full.contiguous(), mesh.axis("world"))
    index: dict[str, int] = {cut.axis: mesh.axis(cut.axis).rank for cut in layout.cuts}
    part = layout.part(full, index)
    # A copy, so that the rest of the whole tensor is freed.
    tensor.data = part.clone(memory_format=torch.contiguous_format) if layout.cuts else full
    tensor.grad = None


def _materialise(module: nn.Module, name: str, seed: int, device: torch.device | None) -> None:
    """Initialise a module that was built on the meta device, from numbers that depend on nothing but its name."""
    reset = getattr(module, "reset_parameters", None)
    if reset is None:
        raise UnsupportedError(
            f"'{name}' ({type(module).__name__}) was built without storage (`init_module(empty_init=True)`) and has no "
            "`reset_parameters()` to initialise it; add one, or build it with `empty_init=False`."
        )
    for _, tensor in _own_tensors(module):
        if tensor.is_meta:
            storage = torch.empty_like(tensor, device=device or torch.device("cpu"))
            whole = nn.Parameter(storage, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else storage
            torch.utils.swap_tensors(tensor, whole)
    with torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else []):
        torch.manual_seed((seed + zlib.crc32(name.encode())) % 2**63)
        reset()


def _common_seed(mesh: TEDMesh, device: torch.device | None) -> int:
    seed = torch.tensor([torch.initial_seed() % 2**62], device=device or torch.device("cpu"))
    return int(broadcast_(seed, mesh.axis("world")).item())


def _check_tied(name: str, first: ParamLayout, cuts: Mapping[str, tuple[Cut, ...]], record: PartitionRecord) -> None:
    own = tuple(cut for cut in cuts.get(name, ()) if cut.degree > 1)
    if own != first.cuts:
        raise PlanError(
            f"'{first.name}' and '{name}' are one tied parameter, but `tensor_parallel_plan` cuts them differently; give both "
            "styles that cut the same dimension (embedding_rowwise with colwise), or leave both out."
        )


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for source in (module._parameters, module._buffers):
        for leaf, tensor in source.items():
            if tensor is None:
                continue
            if isinstance(tensor, DTensor):
                raise UnsupportedError(
                    f"'{leaf}' of {type(module).__name__} is a DTensor; leave the parameters whole and name them in "
                    "`tensor_parallel_plan` instead of calling `parallelize_module`."
                )
            yield leaf, tensor


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
