"""Which rectangles of a whole tensor a rank holds. Integers only.

A checkpoint speaks of whole tensors, and files of boxes of them. A rank's part of a parameter is a box, or several where a fused
dimension is cut block by block; what it owns of a flat range (an optimizer's share) is a few boxes of that part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from lightning_ted.layout import Cut, ParamLayout

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """Consecutive indices of each dimension of a tensor.

    Attributes:
        offsets: The first of each dimension.
        sizes: How many of each.

    """

    offsets: Shape
    sizes: Shape

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)

    @classmethod
    def whole(cls, shape: Shape) -> Box:
        """All of a tensor."""
        return cls((0,) * len(shape), tuple(shape))


def rectangles(shape: Shape, start: int, stop: int) -> Iterator[Box]:
    """The boxes that make up the elements ``[start, stop)`` of a contiguous tensor, in order of memory.

    Each box is contiguous in memory; there are at most ``2 * len(shape) - 1`` of them.
    """
    if start >= stop:
        return
    if not shape or (start == 0 and stop == math.prod(shape)):
        yield Box.whole(shape)
        return
    row = math.prod(shape[1:])
    first, begin = divmod(start, row)
    last, end = divmod(stop, row)
    if first == last:
        yield from _within(first, rectangles(shape[1:], begin, end))
        return
    if begin:
        yield from _within(first, rectangles(shape[1:], begin, row))
        first += 1
    if first < last:
        yield Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))
    yield from _within(last, rectangles(shape[1:], 0, end))


def _within(index: int, boxes: Iterator[Box]) -> Iterator[Box]:
    return (Box((index, *box.offsets), (1, *box.sizes)) for box in boxes)


def placed(box: Box, layout: ParamLayout, index: Mapping[str, int]) -> Iterator[tuple[Box, Box]]:
    """Where a box of a rank's part lies in the whole tensor.

    Args:
        box: A box of the part.
        layout: How the tensor is cut.
        index: The rank's position on each axis.

    Yields:
        A box relative to ``box``, and the box of the whole tensor that it is. More than one pair only where ``box`` reaches over
        several blocks of a fused dimension.

    """
    cut_of = {cut.dim: cut for cut in layout.cuts}
    spans = [
        list(_spans(offset, size, cut_of[dim], index[cut_of[dim].axis])) if dim in cut_of else [(0, offset, size)]
        for dim, (offset, size) in enumerate(zip(box.offsets, box.sizes, strict=True))
    ]
    for chosen in product(*spans):
        sizes = tuple(size for _, _, size in chosen)
        yield Box(tuple(at for at, _, _ in chosen), sizes), Box(tuple(offset for _, offset, _ in chosen), sizes)


def _spans(offset: int, size: int, cut: Cut, rank: int) -> Iterator[tuple[int, int, int]]:
    """Of ``size`` indices of a part from ``offset`` on: where each piece begins in them, where in the whole, and its length."""
    local = whole = 0
    for block in cut.blocks:
        length = block // cut.degree
        begin, end = max(offset, local), min(offset + size, local + length)
        if begin < end:
            yield begin - offset, whole + rank * length + begin - local, end - begin
        local += length
        whole += block
