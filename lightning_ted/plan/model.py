"""A model as its parts, which know their sizes, what they hold on a rank and what they send.

A part is anything with ``weights`` and ``passes``; so a model may hold parts that are not defined here. Weights are listed in the
order in which the layers here define them, which decides where buckets of gradients end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from lightning_ted.errors import TEDError
from lightning_ted.plan.options import require_choice, require_whole
from lightning_ted.plan.place import Family, Place, Weight
from lightning_ted.plan.traffic import (
    Collective,
    Passes,
    Save,
    Step,
    all_gather,
    all_reduce,
    reduce_scatter,
)


class Part(Protocol):
    """A layer or several."""

    def weights(self, at: Place) -> Sequence[Weight]:
        """Its parameters, as one rank holds them, in order of definition."""

    def passes(self, at: Place) -> Passes:
        """What it does in one micro-batch."""


@dataclass(frozen=True)
class Replicated:
    """Layers that are whole on every rank and send nothing: norms, a table of positions, an unplanned linear layer.

    Attributes:
        sizes: Elements of each parameter.

    """

    sizes: tuple[int, ...]

    def weights(self, at: Place) -> Sequence[Weight]:
        return [Weight(size, at.whole_family) for size in self.sizes]

    def passes(self, at: Place) -> Passes:
        return Passes((Save(),))


@dataclass(frozen=True)
class Embedding:
    """A table of tokens.

    Attributes:
        vocabulary: Its rows.
        width: Their length.
        style: ``"replicated"``, or ``"rowwise"``: cut over the vocabulary, and the rows that are found summed.

    """

    vocabulary: int
    width: int
    style: Literal["replicated", "rowwise"] = "replicated"

    def __post_init__(self) -> None:
        require_whole("Embedding", vocabulary=self.vocabulary, width=self.width)
        require_choice("Embedding", "style", self.style, ("replicated", "rowwise"))

    def weights(self, at: Place) -> Sequence[Weight]:
        rows = self.vocabulary if self.style == "replicated" else at.over("tensor", self.vocabulary, "the vocabulary")
        return [Weight(rows * self.width, at.whole_family)]

    def passes(self, at: Place) -> Passes:
        if self.style == "replicated":
            return Passes()
        return Passes(all_reduce(at.tensor, at.tokens * self.width * at.options.widths.weights))


def between_shards(width: int, at: Place) -> Passes:
    """Column-parallel layers that read the same tokens, and the row-parallel layer behind them (arXiv 1909.08053, section 3).

    The row-parallel layer sums its output over the tensor ranks, and the gradients for the input of the column-parallel ones are
    summed in backward: an all-reduce each. With sequence parallelism (arXiv 2205.05198, section 4.2), tokens are gathered before
    and reduce-scattered behind, and the other way round in backward.
    """
    size = width * at.options.widths.products
    whole, own = at.tokens * size, at.own_tokens * size
    if not at.splits_sequences:
        return Passes((Save(), *all_reduce(at.tensor, whole), Save()), all_reduce(at.tensor, whole))
    gathered, scattered = all_gather(at.tensor, own, whole), reduce_scatter(at.tensor, whole, own)
    return Passes((*gathered, Save(), *scattered, Save()), (*gathered, *scattered))


def _linear(at: Place, rows: int, columns: int, bias: bool, cut: int | None) -> list[Weight]:
    """Weight ``[rows, columns]`` and bias ``[rows]`` of a linear layer, dimension ``cut`` of which is shared out (they divide)."""
    degree = 1 if cut is None else at.topology.tensor
    family: Family = "dense" if degree > 1 else at.whole_family
    biased = [Weight(rows // degree, family) if cut == 0 else Weight(rows, at.whole_family)] if bias else []
    return [Weight(rows * columns // degree, family), *biased]


@dataclass(frozen=True)
class Attention:
    """Projections of queries, keys and values, cut by their outputs, and the output projection, cut by its inputs.

    Attributes:
        width: Of the hidden states.
        heads: Query heads.
        head_size: Numbers of one head; None for ``width / heads``.
        kv_heads: Heads of keys and values; None for ``heads``.
        bias: Whether the projections have biases.
        head_norms: Parameters of a head's length that norm queries and keys: their gradients are summed over tensor ranks.
        packed: Whether queries, keys and values are one projection.
        planned: Whether the plan names it; whole on every rank if not.

    """

    width: int
    heads: int
    head_size: int | None = None
    kv_heads: int | None = None
    bias: bool = False
    head_norms: int = 0
    packed: bool = False
    planned: bool = True

    def __post_init__(self) -> None:
        require_whole("Attention", width=self.width, heads=self.heads)
        require_whole("Attention", head_size=self._head_size, kv_heads=self._kv_heads)
        for name, number, divisor in (("heads", self.heads, self._kv_heads), ("width", self.width, self.heads)):
            if number % divisor and not (name == "width" and self.head_size is not None):
                other = "kv_heads" if name == "heads" else "heads"
                raise TEDError(f"`Attention({other}={divisor})` does not divide `{name}={number}`.")

    @property
    def _head_size(self) -> int:
        return self.width // self.heads if self.head_size is None else self.head_size

    @property
    def _kv_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    def weights(self, at: Place) -> Sequence[Weight]:
        cut = self.planned and at.topology.tensor > 1
        if cut:
            at.over("tensor", self.heads, "the heads of attention")
            at.over("tensor", self._kv_heads, "the heads of keys and values")
        outputs = [self.heads * self._head_size, *[self._kv_heads * self._head_size] * 2]
        found = []
        for rows in [sum(outputs)] if self.packed else outputs:
            found += _linear(at, rows, self.width, self.bias, 0 if cut else None)
        found += [Weight(self._head_size, "partial" if cut else at.whole_family)] * self.head_norms
        return [*found, *_linear(at, self.width, outputs[0], self.bias, 1 if cut else None)]

    def passes(self, at: Place) -> Passes:
        if self.planned:
            return between_shards(self.width, at)
        if at.splits_sequences:
            raise TEDError(
                "`Attention(planned=False)` in a stack with `sequence_parallel=True` would see a share of the sequence only; name "
                "it in the plan, or set `sequence_parallel=False`."
            )
        return Passes((Save(),))


@dataclass(frozen=True)
class FeedForward:
    """A dense feed-forward network: projections up, cut by their outputs, and down, cut by its inputs.

    Attributes:
        width: Of the hidden states.
        hidden: Of what is between.
        gated: Whether there are two projections up.
        bias: Whether the projections have biases.
        planned: Whether the plan names it; whole on every rank if not.

    """

    width: int
    hidden: int
    gated: bool = True
    bias: bool = False
    planned: bool = True

    def __post_init__(self) -> None:
        require_whole("FeedForward", width=self.width, hidden=self.hidden)

    def weights(self, at: Place) -> Sequence[Weight]:
        cut = self.planned and at.topology.tensor > 1
        if cut:
            at.over("tensor", self.hidden, "the hidden width of a feed-forward network")
        up = _linear(at, self.hidden, self.width, self.bias, 0 if cut else None)
        return [*up * (1 + self.gated), *_linear(at, self.width, self.hidden, self.bias, 1 if cut else None)]

    def passes(self, at: Place) -> Passes:
        return between_shards(self.width, at) if self.planned else Passes((Save(),))


@dataclass(frozen=True)
class Head:
    """From hidden states to logits, and the loss of them.

    Attributes:
        width: Of the hidden states.
        vocabulary: Number of logits.
        style: ``"replicated"``; ``"gathered"``: cut by its outputs, which are gathered (``colwise_gather_output``); or
            ``"parallel_loss"``: cut, and the loss taken of cut logits (``colwise`` and ``vocab_parallel_loss``).
        bias: Whether it has one.
        tied: Whether its weight is the embedding's.
        smoothed: Whether the loss smooths its labels.

    """

    width: int
    vocabulary: int
    style: Literal["replicated", "gathered", "parallel_loss"] = "replicated"
    bias: bool = False
    tied: bool = False
    smoothed: bool = False

    def __post_init__(self) -> None:
        require_whole("Head", width=self.width, vocabulary=self.vocabulary)
        require_choice("Head", "style", self.style, ("replicated", "gathered", "parallel_loss"))

    def weights(self, at: Place) -> Sequence[Weight]:
        cut = self.style != "replicated" and at.topology.tensor > 1
        if cut:
            at.over("tensor", self.vocabulary, "the vocabulary")
        return _linear(at, self.vocabulary, self.width, self.bias, 0 if cut else None)[self.tied :]

    def passes(self, at: Place) -> Passes:
        """Of a cut head, the gradient for the hidden states is summed. Its logits are gathered; or the loss exchanges, of each
        token, the largest logit, and then the sum of their exponentials and the target's (and, smoothed, the sum of all).
        """
        if self.style == "replicated":
            return Passes((Save(),))
        widths, tokens = at.options.widths, at.tokens
        backward = all_reduce(at.tensor, tokens * self.width * widths.products)
        forward: tuple[Collective, ...]
        if self.style == "gathered":
            logits = tokens * self.vocabulary * widths.products
            forward = all_gather(at.tensor, logits // at.tensor.size, logits)
        else:
            number = tokens * widths.logits
            forward = (*all_reduce(at.tensor, number), *all_reduce(at.tensor, number * (2 + self.smoothed)))
        return Passes((Save(), *forward), backward)


@dataclass(frozen=True)
class Block:
    """Parts that follow each other and are recomputed together.

    Attributes:
        parts: In order.
        dropout: Whether dropout follows the last of them, which is then recomputed to its end.

    """

    parts: tuple[Part, ...]
    dropout: bool = False

    def weights(self, at: Place) -> Sequence[Weight]:
        return [weight for part in self.parts for weight in part.weights(at)]

    def passes(self, at: Place) -> Passes:
        passes = [part.passes(at) for part in self.parts]
        forward: list[Step] = [step for one in passes for step in one.forward]
        if self.dropout:
            forward.append(Save())
        return Passes(tuple(forward), tuple(call for one in passes for call in one.backward))


@dataclass(frozen=True)
class Stack:
    """Blocks in an nn.ModuleList: what activation checkpointing recomputes, each by itself, and sequence parallelism splits.

    Attributes:
        width: Of the hidden states.
        blocks: In order; equal ones may be the same object.

    """

    width: int
    blocks: tuple[Block, ...]

    def __post_init__(self) -> None:
        require_whole("Stack", width=self.width, blocks=len(self.blocks))

    def weights(self, at: Place) -> Sequence[Weight]:
        at = at.in_a_stack()
        known = {block: block.weights(at) for block in dict.fromkeys(self.blocks)}
        return [weight for block in self.blocks for weight in known[block]]

    def ends(self, at: Place) -> Passes:
        """What sequence parallelism does where the stack begins and ends: hidden states are split, their gradients gathered; and
        gathered, their gradients split. Nothing saves a tensor behind the last block, so this is not recomputed.
        """
        at = at.in_a_stack()
        if not at.splits_sequences:
            return Passes()
        size = self.width * at.options.widths.hidden
        gathered = all_gather(at.tensor, at.own_tokens * size, at.tokens * size)
        return Passes(gathered, gathered)


@dataclass(frozen=True)
class Model:
    """Parts and stacks of blocks, in order."""

    parts: tuple[Part | Stack, ...]

    def weights(self, at: Place) -> list[Weight]:
        """All parameters, as one rank holds them, in order of definition."""
        return [weight for part in self.parts for weight in part.weights(at)]
