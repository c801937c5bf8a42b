"""What the reduction of gradients and the exchange of updated weights send, once a step (:mod:`lightning_ted.optim`).

Parameters of one family lie in buckets on the axis over which their gradients are summed. Of a bucket of ``n`` elements on
``g`` ranks, each rank owns ``n / g``: gradients are reduce-scattered, and updated weights all-gathered, ``(g - 1) n / g`` elements
each (ZeRO, arXiv 1910.02054, section 7). Stages 1 and 2 send the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lightning_ted.plan.place import Family, Place, Weight
from lightning_ted.plan.traffic import Collective, all_gather, all_reduce, reduce_scatter
from lightning_ted.topology import AxisName

#: Over which axis a family's gradients are summed.
AXES: dict[Family, AxisName] = {"dense": "data", "partial": "world", "expert": "expert_data"}
#: Elements of one bucket, at most and at least; and how many buckets a family has in between.
LARGEST, SMALLEST, BUCKETS = 2**23, 2**18, 8
#: Parameters and shards begin at multiples of so many elements.
ALIGNMENT = 32
_FLAG, _DOUBLE = 4, 8


@dataclass(frozen=True)
class Bucket:
    """Parameters whose gradients are reduced together.

    Attributes:
        axis: The axis.
        parameters: How many there are.
        shard: Elements of each rank's shard.

    """

    axis: AxisName
    parameters: int
    shard: int


def buckets(weights: Sequence[Weight], at: Place) -> list[Bucket]:
    """The buckets on axes of several ranks, of an elementwise optimizer that steps all weights."""
    found = []
    for family, axis in AXES.items():
        ranks = at.topology.size(axis)
        if ranks == 1:
            continue
        # From the last one, whose gradient comes first.
        sizes = [weight.size for weight in reversed(weights) if weight.family == family]
        for chunk in _chunks(sizes):
            found.append(Bucket(axis, len(chunk), _align(-(-sum(map(_align, chunk)) // ranks))))
    return found


def reduction(weights: Sequence[Weight], at: Place) -> list[Collective]:
    """The collectives of backward that sum gradients.

    Ranks tell each other which gradients they have, and when buckets were complete: four bytes for each parameter and bucket.
    In the first steps, the gradients of whole parameters are compared besides, until each has had one to compare, which depends
    on the data: that is not counted here.
    """
    found: list[Collective] = []
    several = buckets(weights, at)
    for bucket in several:
        ring, own = at.ring(bucket.axis), bucket.shard * at.options.widths.gradients
        found += reduce_scatter(ring, own * ring.size, own)
    flags = sum(bucket.parameters + 1 for bucket in several) * _FLAG
    return [*found, *(all_reduce(at.ring("world"), flags) if several else ())]


def step(weights: Sequence[Weight], at: Place) -> list[Collective]:
    """The collectives of an optimizer step: the norm, a number in double precision, and the weights."""
    found = list(all_reduce(at.ring("world"), _DOUBLE) if at.options.clip_by_norm else ())
    for bucket in buckets(weights, at):
        ring, own = at.ring(bucket.axis), bucket.shard * at.options.widths.weights
        found += all_gather(ring, own, own * ring.size)
    return found


def _chunks(sizes: Sequence[int]) -> Iterator[list[int]]:
    """In order, in chunks of about the same number of elements."""
    limit = min(LARGEST, max(SMALLEST, sum(sizes) // BUCKETS))
    chunk: list[int] = []
    filled = 0
    for size in sizes:
        chunk.append(size)
        filled += size
        if filled >= limit:
            yield chunk
            chunk, filled = [], 0
    if chunk:
        yield chunk


def _align(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT
