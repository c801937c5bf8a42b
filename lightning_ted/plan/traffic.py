"""What a rank sends, as a list of steps that can be counted, kept and done again.

A collective's bytes are those that one rank sends by the ring algorithms, on ``g`` ranks:

==================  ===================================================================
all-reduce          ``2 n (g - 1) / g`` of ``n`` bytes, rounded down
all-gather          ``n (g - 1)`` of ``n`` own bytes
reduce-scatter      ``n - m`` of ``n`` bytes, of whose sum ``m`` stay here
all-to-all          what is addressed to others
==================  ===================================================================

As a recorder counts them. A group of one rank sends nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Phase = Literal["forward", "recomputation", "backward", "optimizer"]
KeepPolicy = Literal["all", "default", "all_to_all"]

#: What a region of activation checkpointing keeps for its recomputation, by policy; full recomputation keeps choices only.
KEPT: dict[str, frozenset[str]] = {
    "all": frozenset({"choice", "sizes", "all_to_all", "all_reduce", "reduce_scatter", "all_gather"}),
    "default": frozenset({"choice", "sizes", "all_to_all", "all_reduce", "reduce_scatter"}),
    "all_to_all": frozenset({"choice", "sizes", "all_to_all"}),
    "full": frozenset({"choice"}),
}
KEEP_POLICIES: tuple[KeepPolicy, ...] = ("all", "default", "all_to_all")


class Key(NamedTuple):
    """What is counted by, as a recorder's keys."""

    kind: str
    axis: str
    phase: Phase


class Ring(NamedTuple):
    """One rank's group on an axis."""

    axis: str
    size: int
    rank: int = 0


@dataclass(frozen=True)
class Collective:
    """One call.

    Attributes:
        kind: Which collective.
        axis: On which axis.
        sent: Bytes that this rank sends.
        outcome: Bytes of what it gives this rank, which a region may keep; None if they are not kept by themselves.

    """

    kind: str
    axis: str
    sent: int
    outcome: int | None = None


@dataclass(frozen=True)
class Unit:
    """Steps whose outcome is kept as one: none of them is done again, and nothing within is kept besides.

    Attributes:
        kind: What it is kept as: a collective's kind, ``"sizes"`` or ``"choice"``.
        axis: Of the collective; None for sizes and choices, whose few numbers are not counted.
        outcome: Bytes.
        steps: What it takes, in order.

    """

    kind: str
    axis: str | None
    outcome: int
    steps: tuple[Collective | Unit, ...]


@dataclass(frozen=True)
class Save:
    """A place where autograd saves a tensor for the backward: a recomputation goes on to the last of them."""


Step = Collective | Unit | Save


@dataclass(frozen=True)
class Passes:
    """What a part of a model does in one micro-batch, in order.

    Attributes:
        forward: Steps of the forward.
        backward: Collectives of the backward: the duals.

    """

    forward: tuple[Step, ...] = ()
    backward: tuple[Collective, ...] = ()


def all_reduce(ring: Ring, held: int) -> tuple[Collective, ...]:
    """The sum of ``held`` bytes on every rank."""
    if ring.size == 1:
        return ()
    return (Collective("all_reduce", ring.axis, 2 * held * (ring.size - 1) // ring.size, held),)


def all_gather(ring: Ring, own: int, whole: int) -> tuple[Collective, ...]:
    """``own`` bytes of each rank, ``whole`` together."""
    return () if ring.size == 1 else (Collective("all_gather", ring.axis, own * (ring.size - 1), whole),)


def reduce_scatter(ring: Ring, whole: int, own: int) -> tuple[Collective, ...]:
    """The sum of ``whole`` bytes, of which ``own`` stay here."""
    return () if ring.size == 1 else (Collective("reduce_scatter", ring.axis, whole - own, own),)


def all_to_all(ring: Ring, sent: int, received: int) -> tuple[Collective, ...]:
    """``sent`` bytes to other ranks; ``received`` from all, this one included."""
    return () if ring.size == 1 else (Collective("all_to_all", ring.axis, sent, received),)


def collectives(steps: Iterable[Step]) -> Iterator[Collective]:
    """All calls of some steps."""
    for step in steps:
        if isinstance(step, Unit):
            yield from collectives(step.steps)
        elif isinstance(step, Collective):
            yield step


def redone(steps: Sequence[Step], policy: str) -> Iterator[Collective]:
    """The calls of a recomputation of some steps, which are one region.

    Torch's checkpoint stops a recomputation when it has made the last tensor that the forward had saved: what comes behind is
    not done again. A row-parallel layer's collective is, as the layer saves its input afterwards; the all-gather that ends a
    MoE layer (of the tokens that its tensor ranks have shared out) or a sequence-parallel stack is not, unless something that
    saves a tensor follows in the same block, such as dropout.
    """
    last = max((index for index, step in enumerate(steps) if isinstance(step, Save)), default=0)
    return _redone(steps[:last], KEPT[policy])


def _redone(steps: Iterable[Step], kinds: frozenset[str]) -> Iterator[Collective]:
    for step in steps:
        if isinstance(step, Unit) and step.kind not in kinds:
            yield from _redone(step.steps, kinds)
        elif isinstance(step, Collective) and (step.outcome is None or step.kind not in kinds):
            yield step


def kept(steps: Iterable[Step], policy: str) -> Counter[tuple[str, str]]:
    """Bytes that a region keeps of some steps, by ``(kind, axis)``."""
    found: Counter[tuple[str, str]] = Counter()
    kinds = KEPT[policy]
    for step in steps:
        if isinstance(step, Save):
            continue
        if step.kind not in kinds:
            if isinstance(step, Unit):
                found.update(kept(step.steps, policy))
        elif step.axis is not None and step.outcome is not None:
            found[step.kind, step.axis] += step.outcome
    return found
