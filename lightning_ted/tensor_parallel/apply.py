"""Applying a plan: classes are swapped here, and what has to be cut is returned; the caller cuts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import cast

from torch import nn

from lightning_ted.errors import PlanError
from lightning_ted.layout import Cut
from lightning_ted.mesh import Axis
from lightning_ted.tensor_parallel.attention import HeadParallelAttention
from lightning_ted.tensor_parallel.builtin import block_fused_inference
from lightning_ted.tensor_parallel.check import check_plan, planned_cuts
from lightning_ted.tensor_parallel.embedding import VocabParallelEmbedding
from lightning_ted.tensor_parallel.linear import ColumnParallelLinear, FeaturesOfHeads, RowParallelLinear, ShardedRegion
from lightning_ted.tensor_parallel.loss import VocabParallelCrossEntropyLoss
from lightning_ted.tensor_parallel.plan import ATTENTION, COLUMN, ROW, Style, outer_name
from lightning_ted.tensor_parallel.randomness import RandomStream, draws_dropout
from lightning_ted.tensor_parallel.sequence import SequenceRegion


@dataclass
class PlanResult:
    """What a plan asks of the parameters.

    Attributes:
        cuts: Qualified parameter name to its cuts.
        partial: Parameters and modules whose gradients are to be summed over the tensor axis.
        regions: What the column- and row-parallel layers share; none outlives a step (:meth:`ShardedRegion.close`).

    """

    cuts: dict[str, tuple[Cut, ...]] = field(default_factory=dict)
    partial: set[str] = field(default_factory=set)
    regions: list[ShardedRegion] = field(default_factory=list)


def find_stacks(root: nn.Module, styles: Mapping[str, Style]) -> dict[str, list[str]]:
    """The stacks of blocks whose activations may be split over tokens: name to names of the blocks.

    A stack is an nn.ModuleList or nn.Sequential, the outermost one of which several children, or all, each hold a column-
    and a row-parallel layer (attention is both). Its blocks are the children from the first such one to the last; a list
    of heads, or of embeddings, is no stack.
    """
    holders = _enclosing(name for name, style in styles.items() if style.name in COLUMN | ATTENTION)
    holders &= _enclosing(name for name, style in styles.items() if style.name in ROW | ATTENTION)
    stacks: dict[str, list[str]] = {}
    for name, module in root.named_modules():
        inside = any(f"{name}.".startswith(f"{block}.") for blocks in stacks.values() for block in blocks)
        if inside or not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        # Not named_children(), which leaves out the second name of a block that is used twice.
        children = [f"{name}.{leaf}" if name else leaf for leaf in module._modules]
        held = [c for c in children if c in holders and _is_called(root.get_submodule(c))]
        if len(held) >= 2 or (held and held == children):
            stacks[name] = children[children.index(held[0]) : children.index(held[-1]) + 1]
    return stacks


def install_sequences(
    root: nn.Module,
    styles: Mapping[str, Style],
    axis: Axis,
    earlier: Mapping[str, SequenceRegion],
    cut: Collection[str],
    complete: bool,
) -> dict[str, SequenceRegion]:
    """Split activations over tokens in the stacks of blocks.

    Args:
        root: The module whose qualified names the other arguments use.
        styles: Qualified name to style, of all layers.
        axis: The tensor axis.
        earlier: What earlier calls have returned.
        cut: Parameters that have been cut already.
        complete: False while layers are still to be built.

    Returns:
        The stacks of this call, by name. Everything whole in their blocks has partial gradients.

    Raises:
        PlanError: If there is no stack in a complete module, or the ends of one cannot be told.

    """
    if axis.size == 1:
        return {}
    regions: dict[str, SequenceRegion] = {}
    for stack, blocks in find_stacks(root, styles).items():
        if stack in earlier and earlier[stack].blocks == blocks:
            continue
        if stack in earlier or any(f"{name}.".startswith(f"{block}.") for name in cut for block in blocks):
            raise PlanError(
                f"`sequence_parallel=True`: the blocks of '{stack}' were built in parts, some of it before `configure_model` "
                f"and some later; build all of it in one place, or set `sequence_parallel=False`."
            )
        distinct = {id(module): module for module in map(root.get_submodule, blocks)}
        if 1 < len(distinct) < len(blocks):
            raise PlanError(
                f"`sequence_parallel=True`: '{stack}' holds a block twice among others, so it cannot be told where the stack "
                f"begins and ends; make it a block of its own, or set `sequence_parallel=False`."
            )
        regions[stack] = SequenceRegion(stack, axis, blocks, list(distinct.values()))
    if complete and not regions and not earlier:
        raise PlanError(
            "`sequence_parallel=True` found no nn.ModuleList or nn.Sequential of blocks that each hold a column- and a "
            "row-parallel layer; put the blocks in one and their layers in `tensor_parallel_plan`, or set "
            "`sequence_parallel=False`."
        )
    return regions


def apply_plan(
    root: nn.Module, styles: Mapping[str, Style], axis: Axis, sequences: Collection[SequenceRegion] = ()
) -> PlanResult:
    """Swap the classes of the styled modules.

    Args:
        root: The module whose qualified names ``styles`` uses.
        styles: Qualified name to style; no module under two names.
        axis: The tensor axis.
        sequences: The stacks whose activations are split over tokens.

    Raises:
        PlanError: If a style does not fit its module, or a size does not divide.

    """
    result = PlanResult()
    if axis.size == 1:
        return result
    check_plan(root, styles, axis.size)
    for parameter, (dim, blocks) in planned_cuts(root, styles).items():
        result.cuts[parameter] = (Cut(dim, "tensor", axis.size, blocks),)
    parameters = {name for name, _ in root.named_parameters(remove_duplicate=False)}
    layers = {name: style for name, style in styles.items() if name not in parameters}
    for around, sequence, names in _group_layers(layers, sequences):
        columns = [name for name in names if styles[name].name in COLUMN]
        region = ShardedRegion(axis, sequence, len(columns), _draws_between(root.get_submodule(around), names, styles))
        if columns:
            _owner(root, around).register_forward_hook(region.close, always_call=True)
        result.regions.append(region)
        for name in names:
            _swap_linear(root.get_submodule(name), styles[name], region)
    for name, style in layers.items():
        if style.beside is not None and style.name in COLUMN | ROW:
            result.regions.append(_apply_to_factor(root, name, style))
    block_fused_inference(root, [name for name, style in styles.items() if style.name in COLUMN | ROW | ATTENTION])
    for name, style in styles.items():
        if style.name in ATTENTION:
            result.regions.append(_share_heads(root, name, axis, sequences))
        elif style.name == "vocab_parallel_loss":
            VocabParallelCrossEntropyLoss.adopt(cast(nn.CrossEntropyLoss, root.get_submodule(name)), axis)
        elif style.name == "embedding_rowwise":
            VocabParallelEmbedding.adopt(cast(nn.Embedding, root.get_submodule(name)), axis, name)
        elif style.name == "replicated_with_grad_allreduce":
            result.partial.add(name)
        elif style.name == "mla_kv_a_proj":
            if any(sequence.contains(name) for sequence in sequences):
                raise PlanError(
                    f"`sequence_parallel=True` does not fit '{name}' (style '{style.name}'); set it to False."
                )
            root.get_submodule(name).register_forward_hook(FeaturesOfHeads(axis, style.blocks[0]))
    return result


def _group_layers(
    styles: Mapping[str, Style], sequences: Collection[SequenceRegion]
) -> list[tuple[str, SequenceRegion | None, list[str]]]:
    """Column- and row-parallel layers that belong together, with the name of the module around them and their stack.

    Column-parallel layers belong with the row-parallel layer nearest to them, in the innermost module that holds both
    kinds, which need not be the parent of either. Layers of only one kind there are grouped by their parents.
    """
    is_column = {
        name: style.name in COLUMN
        for name, style in styles.items()
        if style.name in COLUMN | ROW and style.beside is None
    }
    around_columns = _enclosing(outer_name(name) for name in is_column if is_column[name])
    around_rows = _enclosing(outer_name(name) for name in is_column if not is_column[name])
    near: dict[tuple[str, SequenceRegion | None], list[str]] = defaultdict(list)
    for name in is_column:
        parents = _parents(outer_name(name))
        others = around_rows if is_column[name] else around_columns
        sequence = _stack_of(name, sequences)
        near[next((parent for parent in parents if parent in others), parents[0]), sequence].append(name)
    groups: list[tuple[str, SequenceRegion | None, list[str]]] = []
    for (around, sequence), names in near.items():
        by_parent: dict[str, list[str]] = defaultdict(list)
        for name in names:
            by_parent[_parents(outer_name(name))[0]].append(name)
        both_kinds = len({is_column[name] for name in names}) == 2
        groups += [(around, sequence, names)] if both_kinds else [(p, sequence, n) for p, n in by_parent.items()]
    return groups


def _stack_of(name: str, sequences: Collection[SequenceRegion]) -> SequenceRegion | None:
    return next((sequence for sequence in sequences if sequence.contains(name)), None)


def _share_heads(root: nn.Module, name: str, axis: Axis, sequences: Collection[SequenceRegion]) -> ShardedRegion:
    """Swap the class of an nn.MultiheadAttention; returns the region that it works in."""
    attention = cast(nn.MultiheadAttention, root.get_submodule(name))
    around, _, leaf = name.rpartition(".")
    reads_memory = leaf == "multihead_attn" and isinstance(root.get_submodule(around), nn.TransformerDecoderLayer)
    region = ShardedRegion(axis, _stack_of(name, sequences), readers=1, random=draws_dropout(attention))
    HeadParallelAttention.adopt(attention, region, reads_memory)
    return region


def _draws_between(around: nn.Module, names: Collection[str], styles: Mapping[str, Style]) -> bool:
    """Whether dropout may be drawn on split features, between layers of ``names``."""
    kinds = {styles[name].name for name in names}
    return "rowwise" in kinds and not kinds.isdisjoint({"colwise", "packed_colwise"}) and draws_dropout(around)


def _enclosing(names: Iterable[str]) -> set[str]:
    """The names of all modules around those of ``names``."""
    return {parent for name in names for parent in _parents(name)}


def _parents(name: str) -> list[str]:
    """The names of the modules around ``name``, the innermost first; the last is the root's, which is empty."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in reversed(range(len(parts)))]


def _owner(root: nn.Module, name: str) -> nn.Module:
    """The module in whose forward the children of ``name`` run: itself, or what is around it if it is a mere list."""
    while name and not _is_called(root.get_submodule(name)):
        name = name.rpartition(".")[0]
    return root.get_submodule(name)


def _is_called(module: nn.Module) -> bool:
    """Whether a module has a forward; nn.ModuleList and nn.ModuleDict only hold others."""
    return type(module).forward is not nn.Module.forward


def _apply_to_factor(root: nn.Module, name: str, style: Style) -> ShardedRegion:
    """A factor of an adapter, after the layer beside which it stands; returns the region that is its own."""
    assert style.beside is not None
    around: ShardedRegion = root.get_submodule(style.beside.base).region  # type: ignore[assignment]
    region = ShardedRegion(around.axis, around.sequence, 1, random=False)
    _swap_linear(root.get_submodule(name), style, region)
    dropout = root.get_submodule(style.beside.dropout)
    if around.sequence is None and draws_dropout(dropout):
        if style.name in COLUMN:
            around.except_in(dropout)
        else:
            RandomStream.of_rank(around.axis).surround(dropout)
    return region


def _swap_linear(layer: nn.Module, style: Style, region: ShardedRegion) -> None:
    linear = cast(nn.Linear, layer)
    if style.name in COLUMN:
        ColumnParallelLinear.adopt(linear, region, gather_output=style.name == "colwise_gather_output")
    else:
        RowParallelLinear.adopt(linear, region, split_input=style.name == "rowwise_split_input")
