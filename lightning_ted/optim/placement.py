"""Where the parameters of a bucket lie in its flat memory, and which part of that each rank owns. Integers only.

The flat memory of ``n`` ranks is ``n`` shards of equal length; rank ``r`` owns the ``r``-th. So every rank steps the same
number of elements, however large or few the parameters are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

#: Parameters begin at multiples of so many elements: 64 bytes in 16 bit, more than any kernel asks for.
ALIGNMENT = 32


@dataclass(frozen=True)
class Placement:
    """Flat memory of one bucket.

    Attributes:
        sizes: Elements of each parameter.
        offsets: Where each begins.
        shard: Elements that each rank owns.

    """

    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    shard: int

    def owned(self, rank: int) -> Iterator[tuple[int, int, int]]:
        """``(index, start, stop)``: of which parameters a rank owns which elements, in the order of memory."""
        low, high = rank * self.shard, (rank + 1) * self.shard
        for offset, index in sorted(zip(self.offsets, range(len(self.offsets)), strict=True)):
            start, stop = max(low - offset, 0), min(high - offset, self.sizes[index])
            if start < stop:
                yield index, start, stop

    def counts(self, index: int, ranks: int) -> list[int]:
        """How many elements of a parameter each rank owns."""
        low = self.offsets[index]
        high = low + self.sizes[index]
        return [max(min(high, (rank + 1) * self.shard) - max(low, rank * self.shard), 0) for rank in range(ranks)]


def place_in_order(sizes: Sequence[int], ranks: int) -> Placement:
    """One after the other; a parameter may lie across the border of two shards."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end = align(end + size)
    return Placement(tuple(sizes), tuple(offsets), align(-(-end // ranks)))


def place_whole(sizes: Sequence[int], ranks: int) -> Placement:
    """Each parameter within one shard: the largest first, each to the rank that has least."""
    filled = [0] * ranks
    places: dict[int, tuple[int, int]] = {}
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        rank = filled.index(min(filled))
        places[index] = rank, filled[rank]
        filled[rank] = align(filled[rank] + sizes[index])
    shard = max(filled)
    return Placement(tuple(sizes), tuple(places[i][0] * shard + places[i][1] for i in range(len(sizes))), shard)


def align(count: int) -> int:
    """The next multiple of ``ALIGNMENT``."""
    return -(-count // ALIGNMENT) * ALIGNMENT
