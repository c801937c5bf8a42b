"""Name-pattern plans: which module is cut in which style.

A plan maps name patterns to styles, in the names that Hugging Face's ``tp_plan`` uses. ``*`` stands for one segment of a dotted
name: ``"blocks.*.attention.q_proj": "colwise"``. A module may carry its plan as an attribute ``tp_plan``, with names relative
to itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

from torch import nn

from lightning_ted.errors import PlanError

#: Every style, and what it does.
STYLES: dict[str, str] = {
    "colwise": "cut the output features of a linear layer; its output stays split",
    "packed_colwise": "colwise for fused projections; `packed_colwise:3` names the number of equal blocks (2 where not "
    "given), `packed_colwise:512,128,128` their lengths",
    "colwise_gather_output": "colwise, and gather the output",
    "rowwise": "cut the input features of a linear layer that receives split features, and sum its output",
    "rowwise_split_input": "rowwise for a layer that receives the whole features",
    "multihead_attention": "share out the heads of an nn.MultiheadAttention",
    "embedding_rowwise": "cut the vocabulary of an embedding, and sum its output",
    "vocab_parallel_loss": "an nn.CrossEntropyLoss that receives logits split over the vocabulary (from a colwise head)",
    "replicated_with_grad_allreduce": "whole weights that work on split features; their gradients are summed",
    "mla_kv_a_proj": "`mla_kv_a_proj:64`: a whole linear layer whose last output features (so many) go to split heads directly; "
    "their gradients are summed",
    "replicate": "whole weights on every rank",
}

#: Styles that take numbers, and those that they have without.
_WITH_BLOCKS = {"packed_colwise": (2,), "mla_kv_a_proj": (0,)}

#: Styles of column- and of row-parallel layers.
COLUMN = {"colwise", "packed_colwise", "colwise_gather_output"}
ROW = {"rowwise", "rowwise_split_input"}
#: Style of layers that are both in one.
ATTENTION = {"multihead_attention"}


#: How wrappers around a layer (peft's) name it, and copies of it.
_WRAPPED = re.compile(r"\.(base_layer|original_module|modules_to_save\.[^.]+)$")


def outer_name(name: str) -> str:
    """The name under which a model knows a layer: of one inside a wrapper, that of the wrapper."""
    return _WRAPPED.sub("", name)


@dataclass(frozen=True)
class Beside:
    """Where a factor of an adapter stands.

    Attributes:
        base: Qualified name of the layer to whose output its product is added.
        dropout: That of the dropout which the adapter's input goes through.

    """

    base: str
    dropout: str


@dataclass(frozen=True)
class Style:
    """One entry of a plan, parsed.

    Attributes:
        name: A key of :data:`STYLES`.
        blocks: Of ``packed_colwise``: one number is a count of equal blocks, several are their lengths. Of ``mla_kv_a_proj``: how
            many features go to split heads.
        beside: Of a factor of an adapter: the layer that it belongs to. It shares its input with no other layer.

    """

    name: str
    blocks: tuple[int, ...] = ()
    # A layer under two names has it from either.
    beside: Beside | None = field(default=None, compare=False)

    @classmethod
    def parse(cls, text: str, pattern: str) -> Style:
        """Read ``"name"``, ``"packed_colwise:blocks"`` or ``"mla_kv_a_proj:features"``.

        Raises:
            PlanError: If the style is unknown.

        """
        name, _, arguments = str(text).partition(":")
        if name not in STYLES or (arguments and name not in _WITH_BLOCKS):
            raise PlanError(
                f"`tensor_parallel_plan['{pattern}']={text!r}` is unknown; choose one of {', '.join(STYLES)}."
            )
        if name not in _WITH_BLOCKS:
            return cls(name)
        try:
            blocks = tuple(int(block) for block in arguments.split(",")) if arguments else _WITH_BLOCKS[name]
        except ValueError:
            blocks = (0,)
        if min(blocks) < 1:
            raise PlanError(f"`tensor_parallel_plan['{pattern}']={text!r}`: the blocks must be positive whole numbers.")
        return cls(name, blocks)

    def block_lengths(self, length: int, name: str) -> tuple[int, ...]:
        """Lengths of the blocks of a dimension of ``length``."""
        if len(self.blocks) > 1:
            return self.blocks
        count = self.blocks[0] if self.blocks else 1
        if length % count:
            raise PlanError(f"'{name}' has {length} output features, which {count} equal blocks do not divide.")
        return (length // count,) * count


def collect_plan(root: nn.Module) -> dict[str, str]:
    """The plans that ``root`` and its modules carry as ``tp_plan`` attributes, with names from ``root``."""
    plan: dict[str, str] = {}
    for name, module in root.named_modules():
        carried = module.__dict__.get("tp_plan", getattr(type(module), "tp_plan", None))
        if isinstance(carried, Mapping):
            prefix = f"{name}." if name else ""
            plan.update({prefix + pattern: style for pattern, style in carried.items()})
    return plan


def expand_plan(root: nn.Module, plan: Mapping[str, str], complete: bool = True) -> dict[str, Style]:
    """Match a plan's patterns with the modules and bare parameters of ``root``.

    Args:
        root: The module whose names the patterns match.
        plan: Pattern to style.
        complete: False while layers are still to be built; a pattern may then match nothing.

    Returns:
        Qualified name to style. A later pattern wins over an earlier one.

    Raises:
        PlanError: If a style is unknown, or a pattern matches nothing.

    """
    names = {name for name, _ in root.named_modules(remove_duplicate=False) if name}
    names |= {name for name, _ in root.named_parameters(remove_duplicate=False)}
    styles: dict[str, Style] = {}
    for pattern, text in plan.items():
        style = Style.parse(text, pattern)
        expression = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))
        matched = sorted(name for name in names if expression.fullmatch(name))
        if not matched and complete:
            close = get_close_matches(pattern, names, n=1, cutoff=0.3)
            hint = f"; did you mean '{close[0]}'?" if close else "."
            raise PlanError(f"`tensor_parallel_plan['{pattern}']` matches no module or parameter{hint}")
        styles.update(dict.fromkeys(matched, style))
    return styles
