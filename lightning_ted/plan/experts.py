"""A mixture-of-experts layer: what its tokens' journey to the experts and back sends.

Routing is taken as balanced: a rank's assignments (token by token, choice by choice) are dealt out to the experts in turn,
beginning with the first. So experts get equally many rows of every rank, or the first ones get one more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from lightning_ted.errors import TEDError
from lightning_ted.plan.model import FeedForward
from lightning_ted.plan.options import require_whole
from lightning_ted.plan.place import Place, Weight
from lightning_ted.plan.traffic import (
    Collective,
    Passes,
    Ring,
    Save,
    Step,
    Unit,
    all_gather,
    all_reduce,
    all_to_all,
    reduce_scatter,
)

#: Bytes of a count.
_COUNT = 8


@dataclass(frozen=True)
class MoELayer:
    """Routed experts, and possibly one that all tokens go through.

    Attributes:
        width: Of the hidden states.
        hidden: Of one expert.
        experts: Number of experts.
        top_k: Experts of a token.
        gated: Whether experts have two projections up.
        bias: Whether they have biases.
        shared_expert: A dense network beside them.
        capacity: Whether experts have a capacity; one that balanced routing does not exceed.

    """

    width: int
    hidden: int
    experts: int
    top_k: int = 2
    gated: bool = True
    bias: bool = False
    shared_expert: FeedForward | None = None
    capacity: bool = False

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("width", "hidden", "experts", "top_k")}
        require_whole("MoELayer", **sizes)
        if self.top_k > self.experts:
            raise TEDError(f"`MoELayer(top_k={self.top_k})` must not exceed `experts={self.experts}`.")

    def weights(self, at: Place) -> Sequence[Weight]:
        experts = at.over("expert", self.experts, "the number of experts")
        hidden = at.over("expert_tensor", self.hidden, "the hidden width of an expert")
        found = [experts * hidden * (1 + self.gated) * self.width, experts * self.width * hidden]
        if self.bias:
            width = at.over("expert_tensor", self.width, "the width of the hidden states, which cuts the experts' bias")
            found += [experts * hidden * (1 + self.gated), experts * width]
        router = Weight(self.experts * self.width, "partial" if at.tokens_are_split else "dense")
        shared = [] if self.shared_expert is None else self.shared_expert.weights(at)
        return [*[Weight(size, "expert") for size in found], router, *shared]

    def passes(self, at: Place) -> Passes:
        """See Note [The journey] for what is between dropping and restoring."""
        at.over("expert", self.experts, "the number of experts")
        own, size = at.routed_tokens(at.rank), self.width * at.options.widths.products
        journey = _Journey(self, at).passes()
        shared = Passes() if self.shared_expert is None else self.shared_expert.passes(at)
        forward: list[Step] = [Save(), *self._limit(at), *shared.forward, *journey.forward, Save()]
        backward = [*journey.backward, *shared.backward]
        if at.drops:
            # Each is the dual of the other, and the dual of a gathering of what is the same everywhere is a slice.
            forward += all_gather(at.tensor, own * size, at.tokens * size)
            normed = self.width * at.options.widths.normed
            backward += all_gather(at.tensor, own * normed, at.tokens * normed)
        return Passes(tuple(forward), tuple(backward))

    def _limit(self, at: Place) -> tuple[Unit, ...]:
        """Which assignments fit into a capacity is decided over all tokens of a data-parallel rank, and never anew."""
        if not self.capacity or not at.tokens_are_split:
            return ()
        numbers = self.top_k * _COUNT
        chosen = all_gather(at.tensor, at.routed_tokens(at.rank) * numbers, at.tokens * numbers)
        return (Unit("choice", None, 0, chosen),)

    @property
    def statistics(self) -> int:
        """Numbers that an auxiliary loss sums over all ranks: assignments and scores of every expert, and three more."""
        return 2 * self.experts + 3


@dataclass(frozen=True)
class _Leg:
    """Rows of one chunk.

    Attributes:
        sent: That this rank sends out.
        received: That it receives.
        lanes: Received by all ranks of its expert-tensor group together.
        to_self: Sent to itself.
        inside, middle, across: Hierarchical: of what it sends within its node, what stays here; what then lies here; and of
            what it sends on, what stays here.

    """

    sent: int
    received: int
    lanes: int
    to_self: int
    inside: int = 0
    middle: int = 0
    across: int = 0


class _Journey:
    """Note [The journey].

    Rows (an assignment of a token each) are exchanged over the expert axis and, where the tensor ranks have sent different rows
    (duplicate token dropping, arXiv 2303.06318, section 5.1, or sequence parallelism), gathered over the expert-tensor axis.
    On the way back, the expert-tensor ranks' partial outputs are reduce-scattered, or all-reduced where they have the same rows,
    and exchanged. Before, ranks tell each other how many rows come, 8 bytes for each chunk and expert. In backward, each way
    is the dual of the other: the same bytes again, without the counts.

    A hierarchical exchange is one within the node, and one across nodes between equal places (arXiv 2201.05596, section 5.2).
    """

    def __init__(self, layer: MoELayer, at: Place) -> None:
        self._layer, self._at = layer, at
        self._row = layer.width * at.options.widths.products
        self._expert, self._shards = at.ring("expert"), at.ring("expert_tensor")
        self._splits = at.tokens_are_split
        self._inside, self._across = Ring("expert_inside", 1), Ring("expert_across", 1)
        self._neighbours: Counter[int] = Counter()  # as `_sources`, of this rank's node
        if at.options.dispatcher == "hierarchical":
            per_node = at.options.ranks_per_node or at.topology.world_size
            here, places = at.topology.node_groups("expert", at.rank, per_node)
            self._inside = Ring("expert_inside", len(here), here.index(at.rank))
            self._across = Ring("expert_across", len(places), places.index(at.rank))
            self._neighbours = self._count(here)
        self._hops = self._inside.size > 1 and self._across.size > 1

    def passes(self) -> Passes:
        if self._expert.size == 1 and self._shards.size == 1:
            return Passes()
        legs = [self._leg(chunk) for chunk in range(self._at.options.overlap_chunks)]
        outs = [self._out(leg) for leg in legs]
        backs = [self._back(leg) for leg in legs]
        steps = (*self._tell(), *[unit for out in outs for unit in out], *[unit for back in backs for unit in back])
        return Passes(steps, tuple(_calls(steps[1:])))

    # -- steps ---------------------------------------------------------------------------------------------------------

    def _tell(self) -> tuple[Unit, ...]:
        counts = self._at.options.overlap_chunks * self._layer.experts * _COUNT
        rings = (self._inside, self._across) if self._hops else (self._expert,)
        steps = [step for ring in rings for step in all_to_all(ring, counts * (ring.size - 1) // ring.size, counts)]
        if self._splits:
            steps += all_gather(self._shards, counts, counts * self._shards.size)
        return (Unit("sizes", None, 0, tuple(steps)),)

    def _exchange(self, leg: _Leg, out: bool) -> tuple[Collective, ...]:
        if not self._hops:
            return all_to_all(self._expert, ((leg.sent if out else leg.received) - leg.to_self) * self._row, 0)
        inside = (leg.sent if out else leg.middle) - leg.inside
        across = (leg.middle if out else leg.received) - leg.across
        steps = (*all_to_all(self._inside, inside * self._row, 0), *all_to_all(self._across, across * self._row, 0))
        return steps if out else steps[::-1]

    def _out(self, leg: _Leg) -> tuple[Unit, ...]:
        """An exchange, and a gathering that is kept instead of it where gatherings are kept."""
        steps: tuple[Unit | Collective, ...] = ()
        if self._expert.size > 1:
            steps = (Unit("all_to_all", "expert", leg.received * self._row, self._exchange(leg, out=True)),)
        if self._splits and self._shards.size > 1:
            whole = leg.lanes * self._row
            gathering = all_gather(self._shards, leg.received * self._row, whole)
            return (Unit("all_gather", self._shards.axis, whole, (*steps, *gathering)),)
        return steps  # type: ignore[return-value]

    def _back(self, leg: _Leg) -> tuple[Unit, ...]:
        """One unit, kept as what comes last: the experts' product before it need not be made again either."""
        own, whole = leg.received * self._row, leg.lanes * self._row
        sums = reduce_scatter(self._shards, whole, own) if self._splits else all_reduce(self._shards, own)
        if self._expert.size > 1:
            return (Unit("all_to_all", "expert", leg.sent * self._row, (*sums, *self._exchange(leg, out=False))),)
        return tuple(Unit(step.kind, step.axis, own, sums) for step in sums)

    # -- rows ----------------------------------------------------------------------------------------------------------

    @cached_property
    def _sources(self) -> list[Counter[int]]:
        """How many ranks of the expert axis have so many tokens, for each rank of the expert-tensor axis, this one first."""
        topology, shards = self._at.topology, [self._at.rank]
        if self._splits:
            shards += [rank for rank in topology.group("expert_tensor", self._at.rank) if rank != self._at.rank]
        return [self._count(topology.group("expert", rank)) for rank in shards]

    def _count(self, ranks: Iterable[int]) -> Counter[int]:
        return Counter(self._at.routed_tokens(rank) for rank in ranks)

    def _rows(self, tokens: int, chunk: int, receiver: int) -> int:
        """Rows of a chunk that a rank with so many tokens sends to one of the expert axis."""
        experts, chunks = self._layer.experts // self._expert.size, self._at.options.overlap_chunks
        start, stop = (-(-index * tokens // chunks) * self._layer.top_k for index in (chunk, chunk + 1))
        first, last = receiver * experts, (receiver + 1) * experts
        return _dealt(stop, first, last, self._layer.experts) - _dealt(start, first, last, self._layer.experts)

    def _received(self, sources: Counter[int], chunk: int, receivers: Iterable[int]) -> int:
        """Rows of a chunk that such ranks send to some of the expert axis."""
        receivers = tuple(receivers)
        return sum(
            ranks * self._rows(tokens, chunk, receiver) for tokens, ranks in sources.items() for receiver in receivers
        )

    def _leg(self, chunk: int) -> _Leg:
        me, peers = self._expert.rank, self._expert.size
        own = Counter([self._at.routed_tokens(self._at.rank)])
        lanes = [self._received(sources, chunk, (me,)) for sources in self._sources]
        sent = self._received(own, chunk, range(peers))
        leg = _Leg(sent, lanes[0], sum(lanes), self._received(own, chunk, (me,)))
        if not self._hops:
            return leg
        to_my_place = range(self._inside.rank, peers, self._inside.size)
        return replace(
            leg,
            inside=self._received(own, chunk, to_my_place),
            middle=self._received(self._neighbours, chunk, to_my_place),
            across=self._received(self._neighbours, chunk, (me,)),
        )


def _dealt(assignments: int, first: int, last: int, experts: int) -> int:
    """How many of the first so many assignments go to the experts from ``first`` to before ``last``, dealt in turn."""
    rounds, rest = divmod(assignments, experts)
    return rounds * (last - first) + min(max(rest - first, 0), last - first)


def _calls(steps: Sequence[Unit | Collective]) -> list[Collective]:
    found: list[Collective] = []
    for step in steps:
        found += _calls(step.steps) if isinstance(step, Unit) else [step]
    return found
