"""Where the parameters of a bucket lie in its flat memory, and which part of that each rank owns. Integers only.

The flat memory of ``n`` ranks is ``n`` shards; rank ``r`` owns the ``r``-th. They are of equal length, so every rank steps the
same number of elements however large or few the parameters are; unless parameters are to stay whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

#: Parameters begin at multiples of so many elements: 64 bytes in 16 bit, more than any kernel asks for.
ALIGNMENT = 32


@dataclass(frozen=True)
class Placement:
    """Flat memory of one bucket.

    Attributes:
        sizes: Elements of each parameter.
        offsets: Where each begins.
        borders: Where the shard of each rank begins, and where the last one ends.

    """

    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    borders: tuple[int, ...]

    @property
    def total(self) -> int:
        """Length of the flat memory."""
        return self.borders[-1]

    @property
    def shards(self) -> list[int]:
        """Elements that each rank owns."""
        return [high - low for low, high in pairwise(self.borders)]

    def owned(self, rank: int) -> Iterator[tuple[int, int, int]]:
        """``(index, start, stop)``: of which parameters a rank owns which elements, in the order of memory."""
        low, high = self.borders[rank : rank + 2]
        for offset, index in sorted(zip(self.offsets, range(len(self.offsets)), strict=True)):
            start, stop = max(low - offset, 0), min(high - offset, self.sizes[index])
            if start < stop:
                yield index, start, stop

    def counts(self, index: int) -> list[int]:
        """How many elements of a parameter each rank owns."""
        begin = self.offsets[index]
        end = begin + self.sizes[index]
        return [max(min(end, high) - max(begin, low), 0) for low, high in pairwise(self.borders)]


def place_in_order(sizes: Sequence[int], ranks: int) -> Placement:
    """One after the other; a parameter may lie across the border of two shards."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end = align(end + size)
    shard = align(-(-end // ranks))
    return Placement(tuple(sizes), tuple(offsets), tuple(rank * shard for rank in range(ranks + 1)))


def place_whole(sizes: Sequence[int], ranks: int) -> Placement:
    """Each parameter within one shard: the largest first, each to the rank that has least. Shards are as long as they need."""
    filled = [0] * ranks
    places: dict[int, tuple[int, int]] = {}
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        rank = filled.index(min(filled))
        places[index] = rank, filled[rank]
        filled[rank] = align(filled[rank] + sizes[index])
    borders = tuple(accumulate(filled, initial=0))
    return Placement(tuple(sizes), tuple(borders[places[i][0]] + places[i][1] for i in range(len(sizes))), borders)


def align(count: int) -> int:
    """The next multiple of ``ALIGNMENT``."""
    return -(-count // ALIGNMENT) * ALIGNMENT
