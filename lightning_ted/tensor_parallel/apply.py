"""Applying a plan: classes are swapped here, and what has to be cut is returned; the caller cuts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
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
    """The block stacks (nn.ModuleList, nn.Sequential) that hold column-parallel layers: name to names of the blocks."""
    stacks: dict[str, list[str]] = {}
    for name in styles:
        parts = name.split(".")
        for depth, part in enumerate(parts):
            container = ".".join(parts[:depth])
            if part.isdigit() and isinstance(root.get_submodule(container), (nn.ModuleList, nn.Sequential)):
                children = root.get_submodule(container).named_children()
                stacks.setdefault(container, [f"{container}.{child}" for child, _ in children])
                break
    return stacks


def apply_plan(
    root: nn.Module,
    styles: Mapping[str, Style],
    axis: Axis,
    sequence_parallel: bool = False,
) -> PlanResult:
    """Swap the classes of the styled modules.

    Args:
        root: The module whose qualified names ``styles`` uses.
        styles: Qualified name to style.
        axis: The tensor axis.
        sequence_parallel: Split activations over tokens in the block stacks.

    Raises:
        PlanError: If a style does not fit its module, or a size does not divide.

    """
    result = PlanResult()
    if axis.size == 1:
        return result
    check_heads(root, styles, axis.size)
    sequences = _install_sequences(root, styles, axis, result) if sequence_parallel else {}
    by_parent: dict[str, list[str]] = defaultdict(list)
    for name in styles:
        by_parent[name.rpartition(".")[0]].append(name)
    for parent_name, names in by_parent.items():
        parent = root.get_submodule(parent_name)
        sequence = next((region for stack, region in sequences.items() if parent_name.startswith(f"{stack}.")), None)
        columns = [name for name in names if styles[name].name in _COLUMN]
        rows = [name for name in names if styles[name].name in _ROW]
        region = ShardedRegion(axis, sequence, len(columns), bool(columns and rows) and draws_dropout(parent))
        if columns:
            parent.register_forward_hook(region.close, always_call=True)
        for name in names:
            _apply_style(root, name, styles[name], axis, region, result)
    return result


def _install_sequences(
    root: nn.Module, styles: Mapping[str, Style], axis: Axis, result: PlanResult
) -> dict[str, SequenceRegion]:
    regions: dict[str, SequenceRegion] = {}
    for stack, blocks in find_stacks(root, styles).items():
        regions[stack] = SequenceRegion(stack, axis)
        regions[stack].install(root.get_submodule(blocks[0]), root.get_submodule(blocks[-1]), root.get_submodule(stack))
        result.partial.add(stack)
    if not regions and styles:
        raise PlanError(
            "`sequence_parallel=True` found no nn.ModuleList or nn.Sequential of blocks with column-parallel layers; put the "
            "blocks in one, or set `sequence_parallel=False`."
        )
    return regions


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
    if not isinstance(module, kind) or type(module).forward is not kind.forward:
        raise PlanError(
            f"style '{style.name}' of '{name}' fits a torch.nn.{kind.__name__} with its own forward, not a "
            f"{type(module).__name__}; leave it out of the plan."
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
