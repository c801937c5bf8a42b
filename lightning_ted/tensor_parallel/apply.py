"""Applying a plan: classes are swapped here, and what has to be cut is returned; the caller cuts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from lightning_ted.errors import PlanError
from lightning_ted.layout import Cut
from lightning_ted.mesh import Axis
from lightning_ted.tensor_parallel.embedding import VocabParallelEmbedding
from lightning_ted.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear, ShardedRegion
from lightning_ted.tensor_parallel.loss import VocabParallelCrossEntropyLoss
from lightning_ted.tensor_parallel.plan import Style
from lightning_ted.tensor_parallel.randomness import draws_dropout
from lightning_ted.tensor_parallel.sequence import SequenceRegion
from lightning_ted.topology import divisors, listed

#: Attributes by which attention modules name a number of heads.
HEAD_COUNTS = (
    "num_heads",
    "num_attention_heads",
    "n_heads",
    "n_head",
    "num_key_value_heads",
    "num_kv_heads",
    "n_kv_heads",
)
_COLUMN = {"colwise", "packed_colwise", "colwise_gather_output"}
_ROW = {"rowwise", "rowwise_split_input"}


@dataclass
class PlanResult:
    """What a plan asks of the parameters.

    Attributes:
        cuts: Qualified parameter name to its cuts.
        partial: Parameters and modules whose gradients are to be summed over the tensor axis.

    """

    cuts: dict[str, tuple[Cut, ...]] = field(default_factory=dict)
    partial: set[str] = field(default_factory=set)


def head_counts(root: nn.Module, styles: Mapping[str, Style]) -> dict[str, int]:
    """The numbers of heads that a plan would cut, by qualified attribute name."""
    counts: dict[str, int] = {}
    for parent in {
        name.rpartition(".")[0] for name, style in styles.items() if style.name in _COLUMN - {"colwise_gather_output"}
    }:
        module = root.get_submodule(parent)
        for attribute in HEAD_COUNTS:
            value = getattr(module, attribute, None)
            if isinstance(value, int):
                counts[f"{parent}.{attribute}" if parent else attribute] = value
    return counts


def check_heads(root: nn.Module, styles: Mapping[str, Style], degree: int) -> None:
    """Refuse a tensor-parallel degree that would cut a head in two.

    Raises:
        PlanError: Naming the attribute and the legal choices.

    """
    for name, count in sorted(head_counts(root, styles).items()):
        if count % degree:
            raise PlanError(
                f"`tensor_parallel_size={degree}` does not divide '{name}' = {count}; choose one of {listed(divisors(count))}, or "
                f"leave that module out of the plan."
            )


def find_stacks(root: nn.Module, styles: Mapping[str, Style]) -> dict[str, list[str]]:
    """The stacks of blocks whose activations may be split over tokens: name to names of the blocks.

    A stack is an nn.ModuleList or nn.Sequential, the outermost one of which several children, or all, each hold a column-
    and a row-parallel layer. Its blocks are the children from the first such one to the last; a list of heads, or of
    embeddings, is no stack.
    """
    holders = _enclosing(name for name, style in styles.items() if style.name in _COLUMN)
    holders &= _enclosing(name for name, style in styles.items() if style.name in _ROW)
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
    check_heads(root, styles, axis.size)
    by_parent: dict[str, list[str]] = defaultdict(list)
    for name in styles:
        by_parent[name.rpartition(".")[0]].append(name)
    for parent_name, names in by_parent.items():
        sequence = next((sequence for sequence in sequences if sequence.contains(parent_name)), None)
        columns = [name for name in names if styles[name].name in _COLUMN]
        rows = [name for name in names if styles[name].name in _ROW]
        random = bool(columns and rows) and draws_dropout(root.get_submodule(parent_name))
        region = ShardedRegion(axis, sequence, len(columns), random)
        if columns:
            _owner(root, parent_name).register_forward_hook(region.close, always_call=True)
        for name in names:
            _apply_style(root, name, styles[name], axis, region, result)
    return result


def _enclosing(names: Iterable[str]) -> set[str]:
    """The names of all modules around those of ``names``."""
    return {".".join(parts[:depth]) for parts in (name.split(".") for name in names) for depth in range(1, len(parts))}


def _owner(root: nn.Module, name: str) -> nn.Module:
    """The module in whose forward the children of ``name`` run: itself, or what is around it if it is a mere list."""
    while name and not _is_called(root.get_submodule(name)):
        name = name.rpartition(".")[0]
    return root.get_submodule(name)


def _is_called(module: nn.Module) -> bool:
    """Whether a module has a forward; nn.ModuleList and nn.ModuleDict only hold others."""
    return type(module).forward is not nn.Module.forward


def _apply_style(
    root: nn.Module, name: str, style: Style, axis: Axis, region: ShardedRegion, result: PlanResult
) -> None:
    if style.name == "replicate":
        return
    if style.name == "replicated_with_grad_allreduce":
        result.partial.add(name)
        return
    try:
        module = root.get_submodule(name)
    except AttributeError:
        raise PlanError(
            f"'{name}' is a parameter, which the style '{style.name}' does not fit; name its module."
        ) from None
    if style.name == "vocab_parallel_loss":
        _require(module, nn.CrossEntropyLoss, name, style)
        VocabParallelCrossEntropyLoss.adopt(module, axis)  # type: ignore[arg-type]
    elif style.name == "embedding_rowwise":
        weight = _require(module, nn.Embedding, name, style).weight
        result.cuts[f"{name}.weight"] = (_cut(weight, 0, axis, name),)
        VocabParallelEmbedding.adopt(module, axis, name)  # type: ignore[arg-type]
    elif style.name in _COLUMN:
        linear = _require(module, nn.Linear, name, style)
        blocks = style.block_lengths(linear.out_features, name)
        for leaf in ("weight", "bias"):
            if getattr(linear, leaf) is not None:
                result.cuts[f"{name}.{leaf}"] = (_cut(getattr(linear, leaf), 0, axis, name, blocks),)
        ColumnParallelLinear.adopt(linear, region, gather_output=style.name == "colwise_gather_output")
    else:
        linear = _require(module, nn.Linear, name, style)
        result.cuts[f"{name}.weight"] = (_cut(linear.weight, 1, axis, name),)
        RowParallelLinear.adopt(linear, region, split_input=style.name == "rowwise_split_input")


def _require(module: nn.Module, kind: type[nn.Module], name: str, style: Style) -> nn.Linear:
    # nn.CrossEntropyLoss has a buffer of this name.
    if isinstance(module, kind) and "weight" not in (module._parameters | module._buffers):
        raise PlanError(
            f"'{name}' makes its weight from other parameters (weight_norm, spectral_norm or another parametrization), so it "
            f"cannot be cut by the style '{style.name}'; remove the parametrization, or leave it out of the plan."
        )
    if type(module) is not kind:
        raise PlanError(
            f"style '{style.name}' of '{name}' fits a torch.nn.{kind.__name__} itself, not a {type(module).__name__}, whose own "
            f"methods would be lost; leave it out of the plan."
        )
    return module  # type: ignore[return-value]


def _cut(parameter: Tensor, dim: int, axis: Axis, name: str, blocks: tuple[int, ...] = ()) -> Cut:
    blocks = blocks or (parameter.shape[dim],)
    if sum(blocks) != parameter.shape[dim]:
        raise PlanError(f"the blocks {blocks} of '{name}' do not add up to its {parameter.shape[dim]} output features.")
    for block in blocks:
        if block % axis.size:
            raise PlanError(
                f"`tensor_parallel_size={axis.size}` does not divide the width {block} of '{name}'; choose one of "
                f"{listed(divisors(block))}, or leave '{name}' out of the plan."
            )
    return Cut(dim, "tensor", axis.size, blocks)
