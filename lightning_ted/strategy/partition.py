"""Cutting a module in place: each tensor is taken from rank 0, cut, and the rest forgotten before the next one.

Note [Why parameters are cut in place]
``parameter.data`` is replaced by this rank's part, so the ``Parameter`` object stays: optimizers that were made
earlier, tied names, frozen flags and callbacks that hold parameters stay valid. How it was cut is kept in a record on the
LightningModule, not on the parameter, whose attributes do not survive a copy.

Note [What has been cut already]
A name may stand for something new: a layer that a ``setup`` hook replaces. So the record holds the very objects: a
parameter is known by itself, under whatever name; a buffer by the module that owns it, because moving a module to another
dtype replaces its buffers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_ted.adapters import MoESpec, adopt, initialisers, load_pretrained
from lightning_ted.collectives.primitives import broadcast_
from lightning_ted.errors import LayoutError, PlanError, UnsupportedError
from lightning_ted.layout import Cut, Family, ParamLayout
from lightning_ted.mesh import SINGLE, TEDMesh
from lightning_ted.moe.axes import MoEAxes
from lightning_ted.moe.expert_parallel import expert_parallel_layers
from lightning_ted.strategy.dtensors import Unwrapped, refuse_in_plan, unwrap, wrap
from lightning_ted.strategy.materialise import common_seed, materialise, own_tensor, own_tensors
from lightning_ted.strategy.sizes import module_styles
from lightning_ted.tensor_parallel.apply import PlanResult, apply_plan, install_sequences
from lightning_ted.tensor_parallel.linear import ShardedRegion
from lightning_ted.tensor_parallel.sequence import SequenceRegion
from lightning_ted.topology import Topology

_RECORD = "_ted_partition"
_REBUILD = "Build the module anew, and load a checkpoint into it to keep the weights."
#: Styles that change nothing in a module, so that another may take its name.
_MARKS_ONLY = {"replicate", "replicated_with_grad_allreduce"}

Cuts = Mapping[str, tuple[Cut, ...]]


@dataclass(frozen=True)
class PartitionOptions:
    """What the strategy's arguments say about cutting.

    Attributes:
        plan: Tensor-parallel plan.
        sequence_parallel: Split activations over tokens between tensor-parallel regions.
        duplicate_token_dropping: Tensor ranks dispatch only their share of the tokens.
        dispatcher: What brings tokens to the experts of other ranks.
        overlap_chunks: In how many chunks it does.
        specs: What is said of MoE blocks of the user's own.

    """

    plan: Literal["auto"] | Mapping[str, str] = "auto"
    sequence_parallel: bool = False
    duplicate_token_dropping: bool = True
    # They cut nothing: a module may go on with others.
    dispatcher: str = field(default="all_to_all", compare=False)
    overlap_chunks: int = field(default=1, compare=False)
    specs: tuple[MoESpec, ...] = field(default=(), compare=False)


@dataclass
class PartitionRecord:
    """How a module was cut.

    Attributes:
        mesh: The mesh that its layers communicate on; None once the module has been pickled.
        topology: The mesh's.
        options: With which arguments.
        layouts: Layout of every parameter and buffer, by qualified name.
        owners: What stood behind each of these names: the parameter, or the module of a buffer.
        partial: Names below which gradients are summed over the tensor axis.
        sequences: Stacks of blocks whose activations are split over tokens.
        styled: What a plan has been applied to, by qualified name.
        regions: What its column- and row-parallel layers share.

    """

    mesh: TEDMesh | None
    topology: Topology
    options: PartitionOptions
    layouts: dict[str, ParamLayout] = field(default_factory=dict)
    owners: dict[str, object] = field(default_factory=dict)
    partial: set[str] = field(default_factory=set)
    sequences: dict[str, SequenceRegion] = field(default_factory=dict)
    styled: dict[str, object] = field(default_factory=dict)
    regions: list[ShardedRegion] = field(default_factory=list)


def mesh_of(module: nn.Module | None) -> TEDMesh | None:
    """The mesh for which ``module`` has been cut before; None if it has not.

    Raises:
        UnsupportedError: If its layers have lost their process groups.

    """
    record: PartitionRecord | None = None if module is None else module.__dict__.get(_RECORD)
    if record is None:
        return None
    if record.mesh is None or not record.mesh.is_alive:
        how = "pickled" if record.mesh is None else "cut in a process group that has been destroyed"
        raise UnsupportedError(
            f"{type(module).__name__} holds the parts of one rank and has been {how}, so its layers cannot communicate any "
            f"more. {_REBUILD}"
        )
    return record.mesh


def close_regions(module: nn.Module) -> None:
    """End what a step has left open: layers that hang on ``module`` itself, whose forward need not have been called."""
    record: PartitionRecord | None = module.__dict__.get(_RECORD)
    for region in [] if record is None else record.regions:
        region.close()


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
        mesh: The mesh; a module that has been cut before stays on the mesh that it was cut for.
        options: What to cut, and how.
        device: Where the parts are to live; None leaves them where the tensors are.
        complete: False while the module has layers still to build.

    Returns:
        The layout of every parameter and buffer, by qualified name; tied names each have one.

    Raises:
        PlanError, LayoutError: If the plan does not fit the module.
        UnsupportedError: For DTensors that cannot be replaced by plain parameters, for meta tensors that nothing can
            initialise, and for modules that were cut in processes that are gone.

    """
    mesh = mesh_of(module) or mesh
    record: PartitionRecord = module.__dict__.setdefault(_RECORD, PartitionRecord(mesh, mesh.topology, options))
    if record.topology != mesh.topology or record.options != options:
        raise LayoutError(
            f"{type(module).__name__} has been cut for {record.topology}, {record.options} and cannot be cut again for "
            f"{mesh.topology}, {options}. {_REBUILD}"
        )
    adopt(module, options.specs, complete)
    handmade = unwrap(module, mesh, device)
    result = _mark_plan(module, mesh, options, record, handmade, complete)
    cuts = result.cuts | handmade.cuts | _mark_experts(module, mesh, options, record)
    record.partial |= result.partial
    record.regions += result.regions
    _place_all(module, mesh, record, cuts, handmade, device)
    wrap(handmade)
    return record.layouts


def _place_all(
    module: nn.Module,
    mesh: TEDMesh,
    record: PartitionRecord,
    cuts: Cuts,
    handmade: Unwrapped,
    device: torch.device | None,
) -> None:
    """Cut every tensor that the record does not know, and bring the record up to date."""
    before, owners_before = dict(record.layouts), dict(record.owners)
    known = {_key(owner, name): before[name] for name, owner in owners_before.items()}
    named = [
        (_join(prefix, leaf), leaf, child)
        for prefix, child in module.named_modules(remove_duplicate=False)
        for leaf, _ in own_tensors(child)
    ]
    names = {name for name, _, _ in named}
    read = load_pretrained(module, cuts, mesh, device)
    resets = initialisers(module)
    unmatched = set(cuts) - names
    if unmatched:
        raise PlanError(
            f"`tensor_parallel_plan` cuts '{min(unmatched)}', which is no parameter of {type(module).__name__} (a "
            "parametrization may have replaced it); leave its module out of the plan."
        )
    seed: int | None = None
    homes: dict[tuple[int, str], nn.Module] = {}
    for gone in before.keys() - names:
        del record.layouts[gone], record.owners[gone]
    for name, leaf, child in named:
        tensor = own_tensor(child, leaf)
        if tensor.is_meta:
            seed = common_seed(mesh, device) if seed is None else seed
            shapes = _whole_shapes(child, known) | _read_shapes(child, read)
            materialise(child, name.rpartition(".")[0], seed, device, shapes, resets.get(id(child)))
            tensor = own_tensor(child, leaf)
        owner = _owner(tensor, child)
        key = _key(owner, name)
        layout, home = known.get(key), homes.setdefault(key, child)
        if layout is None:
            shape = handmade.shapes.get(name) or read.get(id(tensor), tuple(tensor.shape))
            layout = _layout(name, shape, cuts, record, before.get(name))
            if id(tensor) not in read:
                _place(tensor, layout, mesh, device)
            known[key] = layout
        elif layout.name in names and (name not in before or _key(owners_before[name], name) != key):
            # Its own style may have been applied in an earlier pass, to the parameter that it had then.
            earlier = before[name].cuts if name in before else ()
            _check_tied(name, layout, layout.cuts if home is child else cuts.get(name, earlier), record.partial)
        record.layouts[name] = replace(layout, name=name)
        record.owners[name] = owner


def _owner(tensor: Tensor, module: nn.Module) -> object:
    return tensor if isinstance(tensor, nn.Parameter) else module


def _whole_shapes(module: nn.Module, known: Mapping[tuple[int, str], ParamLayout]) -> dict[str, tuple[int, ...]]:
    """Of a module's own tensors that have been placed, the shapes that they had whole."""
    keys = {leaf: _key(_owner(tensor, module), leaf) for leaf, tensor in own_tensors(module)}
    return {leaf: known[key].global_shape for leaf, key in keys.items() if key in known}


def _read_shapes(module: nn.Module, read: Mapping[int, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Of a module's own tensors whose parts have been read from files, the shapes of the whole ones."""
    return {leaf: read[id(tensor)] for leaf, tensor in own_tensors(module) if id(tensor) in read}


def _key(owner: object, name: str) -> tuple[int, str]:
    return (id(owner), "" if isinstance(owner, nn.Parameter) else name.rpartition(".")[2])


def _join(prefix: str, leaf: str) -> str:
    return f"{prefix}.{leaf}" if prefix else leaf


def _mark_plan(
    module: nn.Module,
    mesh: TEDMesh,
    options: PartitionOptions,
    record: PartitionRecord,
    handmade: Unwrapped,
    complete: bool,
) -> PlanResult:
    styles = module_styles(module, options.plan, complete)
    refuse_in_plan(module, handmade, styles)
    known = {id(target) for target in record.styled.values()}
    targets = {name: _target(module, name) for name in styles}
    for name, target in targets.items():
        replaced = name in record.styled and id(target) not in known
        if replaced and styles[name].name not in _MARKS_ONLY and mesh.topology.tensor > 1:
            raise UnsupportedError(
                f"'{name}' has been replaced after the plan was applied to it (style '{styles[name].name}'). Replace it in "
                "`__init__` or `configure_model`, or leave it out of the plan."
            )
    first_names: dict[int, str] = {}
    for name, target in targets.items():
        first = first_names.setdefault(id(target), name)
        if styles[first] != styles[name]:
            raise PlanError(
                f"'{first}' and '{name}' are one and the same, but `tensor_parallel_plan` gives them the styles "
                f"'{styles[first].name}' and '{styles[name].name}'; give both the same."
            )
    fresh = {name: styles[name] for target, name in first_names.items() if target not in known}
    record.styled |= targets
    if options.sequence_parallel:
        new = install_sequences(module, styles, mesh.axis("tensor"), record.sequences, record.layouts, complete)
        record.sequences |= new
        record.partial |= {block for sequence in new.values() for block in sequence.blocks}
    result = apply_plan(module, fresh, mesh.axis("tensor"), record.sequences.values())
    result.partial |= {name for name, target in targets.items() if first_names[id(target)] in result.partial}
    return result


def _target(module: nn.Module, name: str) -> object:
    """The module or parameter of a name."""
    parent, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(parent), leaf)


def _mark_experts(
    module: nn.Module, mesh: TEDMesh, options: PartitionOptions, record: PartitionRecord
) -> dict[str, tuple[Cut, ...]]:
    """Give the MoE layers their axes; returns the cuts of their experts."""
    cuts: dict[str, tuple[Cut, ...]] = {}
    layers = expert_parallel_layers(module)
    nodes = mesh.node_axes("expert") if layers and options.dispatcher == "hierarchical" else (SINGLE, SINGLE)
    for name, layer in layers.items():
        axes = layer.axes
        if axes is None:
            cuts |= {_join(name, leaf): cut for leaf, cut in layer.expert_cuts(mesh.topology).items()}
            axes = MoEAxes(
                world=mesh.axis("world"),
                data=mesh.axis("data"),
                tensor=mesh.axis("tensor"),
                expert=mesh.axis("expert"),
                expert_tensor=mesh.axis("expert_tensor"),
                drop_duplicates=options.duplicate_token_dropping,
                sequence=next((region for region in record.sequences.values() if region.contains(name)), None),
            )
        layer.place(axes.sending(*nodes, options.dispatcher, options.overlap_chunks))
        holder = module.get_submodule(name)
        for every_name, other in module.named_modules(remove_duplicate=False):
            if other is holder:
                record.partial |= {_join(every_name, leaf) for leaf in layer.partial_names()}
    return cuts


def _family(name: str, cuts: tuple[Cut, ...], partial: set[str]) -> Family:
    if any(cut.axis == "expert" for cut in cuts):
        return "expert"
    if not cuts and any(name == marked or name.startswith(f"{marked}.") for marked in partial):
        return "partial"
    return "dense"


def _layout(
    name: str, shape: tuple[int, ...], cuts: Cuts, record: PartitionRecord, before: ParamLayout | None
) -> ParamLayout:
    """The layout of a new tensor of this (whole) shape; ``before``: of the one that had its name."""
    if name not in cuts and before is not None and before.cuts:
        # Its module is the same, so it has to lie as the one before it.
        if shape not in (before.global_shape, before.local_shape):
            raise LayoutError(
                f"'{name}' has been replaced by a parameter of shape {shape}, where {before.global_shape} "
                f"(whole) or {before.local_shape} (this rank's part) is wanted. Replace it in `__init__` or `configure_model`."
            )
        return before
    own = cuts.get(name, ())
    family = _family(name, own, record.partial)
    own = tuple(cut for cut in own if cut.degree > 1)
    copies = record.topology.world_size
    for cut in own:
        copies //= cut.degree
    return ParamLayout(name, shape, own, family, copies)


def _place(tensor: Tensor, layout: ParamLayout, mesh: TEDMesh, device: torch.device | None) -> None:
    """Replace a whole tensor by this rank's part of rank 0's."""
    full = tensor.data if device is None else tensor.data.to(device)
    tensor.grad = None
    if layout.cuts and tuple(full.shape) == layout.local_shape:
        tensor.data = full  # a copy of this rank's part
        return
    full = broadcast_(full.contiguous(), mesh.axis("world"))
    index: dict[str, int] = {cut.axis: mesh.axis(cut.axis).rank for cut in layout.cuts}
    part = layout.part(full, index)
    # A copy, so that the rest of the whole tensor is freed.
    tensor.data = part.clone(memory_format=torch.contiguous_format) if layout.cuts else full


def _check_tied(name: str, first: ParamLayout, own: tuple[Cut, ...], partial: set[str]) -> None:
    """See that a second name of a parameter asks for what its first name got."""
    if tuple(cut for cut in own if cut.degree > 1) != first.cuts:
        raise PlanError(
            f"'{first.name}' and '{name}' are one tied parameter, but `tensor_parallel_plan` cuts them differently; give both "
            "styles that cut the same dimension (embedding_rowwise with colwise), or leave both out."
        )
    if first.family != "expert" and _family(name, own, partial) != first.family:
        raise PlanError(
            f"'{first.name}' and '{name}' are one tied parameter, but its gradient is a part on each tensor rank under one of "
            "the names (inside a sequence-parallel stack, or by the style replicated_with_grad_allreduce) and whole under the "
            "other. Give both names the same style, or untie them."
        )
