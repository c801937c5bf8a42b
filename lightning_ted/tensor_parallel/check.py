"""Whether a plan fits a module: what it would cut, and by which degrees that divides. Nothing is changed here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeVar

from torch import nn

from lightning_ted.errors import PlanError
from lightning_ted.tensor_parallel.attention import IN_PROJECTIONS, HeadParallelAttention
from lightning_ted.tensor_parallel.embedding import VocabParallelEmbedding
from lightning_ted.tensor_parallel.plan import ATTENTION, COLUMN, ROW, Style, outer_name
from lightning_ted.topology import divisors, listed

M = TypeVar("M", bound=nn.Module)

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


def head_counts(root: nn.Module, styles: Mapping[str, Style]) -> dict[str, int]:
    """The numbers of heads that a plan would cut, by qualified attribute name."""
    counts: dict[str, int] = {}
    for parent in {
        outer_name(name).rpartition(".")[0]
        for name, style in styles.items()
        if style.name in COLUMN - {"colwise_gather_output"} and style.beside is None
    }:
        module = root.get_submodule(parent)
        # Attention modules of Hugging Face keep these numbers in their configuration.
        configuration = getattr(module, "config", None) if "Attention" in type(module).__name__ else None
        for holder, place in ((configuration, "config."), (module, "")):
            for attribute in HEAD_COUNTS:
                value = getattr(holder, attribute, None)
                if isinstance(value, int):
                    counts[f"{parent}.{place}{attribute}" if parent else f"{place}{attribute}"] = value
    for name, style in styles.items():
        attention = root.get_submodule(name) if style.name in ATTENTION else None
        if isinstance(attention, nn.MultiheadAttention):
            counts[f"{name}.num_heads"] = attention.num_heads
    return counts


def planned_cuts(root: nn.Module, styles: Mapping[str, Style]) -> dict[str, tuple[int, tuple[int, ...]]]:
    """What a plan cuts: qualified parameter name to the dimension, and the lengths of the blocks that it consists of.

    Raises:
        PlanError: If a style does not fit its module.

    """
    return {name: cut for layer, style in styles.items() for name, cut in _cuts_of(root, layer, style).items()}


def check_plan(root: nn.Module, styles: Mapping[str, Style], degree: int) -> None:
    """Refuse a plan that does not fit the module, and a tensor-parallel degree that does not divide what it cuts.

    Args:
        root: The module whose qualified names ``styles`` uses, not cut yet.
        styles: Qualified name to style.
        degree: Tensor-parallel degree.

    Raises:
        PlanError: Naming the module and the legal choices.

    """
    for name, count in sorted(head_counts(root, styles).items()):
        if count % degree:
            raise PlanError(
                f"`tensor_parallel_size={degree}` does not divide '{name}' = {count}; choose one of {listed(divisors(count))}, or "
                f"leave that module out of the plan (style 'replicate')."
            )
    for parameter, (_, blocks) in planned_cuts(root, styles).items():
        name = parameter.rpartition(".")[0]
        for block in blocks:
            if block % degree:
                raise PlanError(
                    f"`tensor_parallel_size={degree}` does not divide the width {block} of '{name}'; choose one of "
                    f"{listed(divisors(block))}, or leave '{name}' out of the plan (style 'replicate')."
                )


def _cuts_of(root: nn.Module, name: str, style: Style) -> dict[str, tuple[int, tuple[int, ...]]]:
    if style.name in ("replicate", "replicated_with_grad_allreduce"):
        return {}
    try:
        module = root.get_submodule(name)
    except AttributeError:
        owner = root.get_submodule(name.rpartition(".")[0])
        if style.name == "colwise" and not type(owner).__module__.startswith("torch."):
            # A parameter with an entry, or a row, for each head. A layer of torch's needs its parameters cut together.
            return {name: (0, (root.get_parameter(name).shape[0],))}
        raise PlanError(
            f"'{name}' is a parameter, which the style '{style.name}' does not fit; name its module."
        ) from None
    if style.name == "vocab_parallel_loss":
        _require(module, nn.CrossEntropyLoss, name, style)
        return {}
    if style.name == "embedding_rowwise":
        embedding = _require(module, nn.Embedding, name, style)
        VocabParallelEmbedding.check(embedding, name)
        return {f"{name}.weight": (0, (embedding.num_embeddings,))}
    if style.name in ATTENTION:
        attention = _require(module, nn.MultiheadAttention, name, style, IN_PROJECTIONS)
        if "weight" not in attention.out_proj._parameters:
            raise PlanError(
                f"'{name}.out_proj' makes its weight from other parameters or layers, so the heads of '{name}' cannot be shared "
                "out; leave it out of the plan."
            )
        return {f"{name}.{leaf}": cut for leaf, cut in HeadParallelAttention.cuts(attention).items()}
    linear = _require(module, nn.Linear, name, style)
    if style.name == "mla_kv_a_proj":
        if style.blocks[0] > linear.out_features:
            raise PlanError(
                f"'{name}' has {linear.out_features} output features, of which {style.blocks[0]} are to go to heads."
            )
        return {}
    if style.name in ROW:
        return {f"{name}.weight": (1, (linear.in_features,))}
    blocks = style.block_lengths(linear.out_features, name)
    if sum(blocks) != linear.out_features:
        raise PlanError(f"the blocks {blocks} of '{name}' do not add up to its {linear.out_features} output features.")
    return {f"{name}.{leaf}": (0, blocks) for leaf in ("weight", "bias") if getattr(linear, leaf) is not None}


def _require(module: nn.Module, kind: type[M], name: str, style: Style, weights: Collection[str] = ("weight",)) -> M:
    """``module``, if it is of this very kind and its ``weights`` are its own."""
    # nn.CrossEntropyLoss has a buffer of this name.
    if isinstance(module, kind) and not set(weights) <= (module._parameters | module._buffers).keys():
        raise PlanError(
            f"'{name}' makes its weight from other parameters (weight_norm, spectral_norm or another parametrization), so it "
            f"cannot be cut by the style '{style.name}'; remove the parametrization, or leave it out of the plan."
        )
    if not isinstance(module, kind) or type(module) is not kind:
        raise PlanError(
            f"style '{style.name}' of '{name}' fits a torch.nn.{kind.__name__} itself, not a {type(module).__name__}, whose own "
            f"methods would be lost; leave it out of the plan."
        )
    return module
