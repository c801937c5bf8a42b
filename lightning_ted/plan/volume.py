"""Calls and bytes of one optimizer step, from the configuration alone: what a recorder counts, exactly.

Held equal to :class:`lightning_ted.collectives.recorder.CommRecorder` by ``tests/distributed/test_volume.py``. What is not
predicted, because it depends on data: routing that is not balanced (see :mod:`lightning_ted.plan.experts`), the comparison of
replicated gradients in the first steps, ranks of different batches, and gradients that are missing. What enters a stack of
blocks is taken to need a gradient, as what comes out of an embedding that is trained does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from lightning_ted.plan import gradients
from lightning_ted.plan.experts import MoELayer
from lightning_ted.plan.model import Block, Model, Part, Stack
from lightning_ted.plan.options import Options
from lightning_ted.plan.place import Place
from lightning_ted.plan.traffic import (
    KEEP_POLICIES,
    Collective,
    KeepPolicy,
    Key,
    Passes,
    Phase,
    all_reduce,
    collectives,
    kept,
    redone,
)
from lightning_ted.topology import Topology


@dataclass
class Volume:
    """What one rank sends.

    Attributes:
        calls: Number of collectives by kind, axis and phase.
        bytes: Bytes by the same.
        kept: Bytes that regions keep for their recomputation in one micro-batch, by ``(kind, axis)``.

    """

    calls: Counter[Key] = field(default_factory=Counter)
    bytes: Counter[Key] = field(default_factory=Counter)
    kept: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, calls: Iterable[Collective], phase: Phase, times: int = 1) -> None:
        """Count some collectives, each so many times."""
        for call in calls:
            key = Key(call.kind, call.axis, phase)
            self.calls[key] += times
            self.bytes[key] += times * call.sent


def volume(model: Model, topology: Topology, options: Options, rank: int = 0) -> Volume:
    """What a rank sends in one optimizer step.

    Args:
        model: Its parts.
        topology: The layout.
        options: How it is trained.
        rank: Of which rank; they differ where tokens cannot be shared out evenly.

    Raises:
        LayoutError: If the layout does not divide a size of the model; or there is no such rank.

    """
    at = Place(topology, options, rank)
    found = Volume()
    regions = _regions(model, at)
    for passes, times in [*regions, *_outside(model, at)]:
        found.add(collectives(passes.forward), "forward", times * options.accumulation)
        found.add(passes.backward, "backward", times * options.accumulation)
    if options.keeps is not None:
        for passes, times in regions:
            found.add(redone(passes.forward, options.keeps), "recomputation", times * options.accumulation)
    if options.checkpointing == "comm_aware":
        found.kept.update(_kept(regions, options.policy))
    weights = model.weights(at)
    found.add(gradients.reduction(weights, at), "backward")
    found.add(gradients.step(weights, at), "optimizer")
    return found


def kept_memory(
    model: Model, topology: Topology, options: Options, rank: int = 0
) -> dict[KeepPolicy, Counter[tuple[str, str]]]:
    """Bytes that each policy of communication-aware checkpointing keeps of one micro-batch, by ``(kind, axis)``."""
    regions = _regions(model, Place(topology, options, rank))
    return {policy: _kept(regions, policy) for policy in KEEP_POLICIES}


def _kept(regions: Iterable[tuple[Passes, int]], policy: KeepPolicy) -> Counter[tuple[str, str]]:
    found: Counter[tuple[str, str]] = Counter()
    for passes, times in regions:
        found.update({key: times * size for key, size in kept(passes.forward, policy).items()})
    return found


def _regions(model: Model, at: Place) -> list[tuple[Passes, int]]:
    """What activation checkpointing looks after: stacks, and how often equal blocks are there."""
    found = []
    for stack in model.parts:
        if isinstance(stack, Stack):
            found.append((stack.ends(at), 1))  # in the region of the last block
            found += [(block.passes(at.in_a_stack()), times) for block, times in Counter(stack.blocks).items()]
    return found


def _outside(model: Model, at: Place) -> list[tuple[Passes, int]]:
    """All else of a micro-batch."""
    parts = [part.passes(at) for part in model.parts if not isinstance(part, Stack)]
    return [(passes, 1) for passes in [*parts, _auxiliary(model, at)]]


def _auxiliary(model: Model, at: Place) -> Passes:
    """The statistics of all MoE layers travel in one all-reduce: over the world if tensor ranks route different tokens. The
    gradient for them is summed over the data axis.
    """
    layers = [layer for part in model.parts for layer in _moe_layers(part)]
    if not layers or not at.options.auxiliary_loss:
        return Passes()
    size = sum(layer.statistics for layer in layers) * at.options.widths.statistics
    first = at.in_a_stack() if any(isinstance(part, Stack) and any(_moe_layers(part)) for part in model.parts) else at
    ring = at.ring("world" if first.tokens_are_split else "data")
    return Passes(all_reduce(ring, size), all_reduce(at.ring("data"), size))


def _moe_layers(part: Part | Stack) -> Iterator[MoELayer]:
    if isinstance(part, MoELayer):
        yield part
    for inner in part.blocks if isinstance(part, Stack) else part.parts if isinstance(part, Block) else ():
        yield from _moe_layers(inner)
