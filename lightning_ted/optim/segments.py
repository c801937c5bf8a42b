"""What the optimizer steps: segments of the elements that a rank owns, some at a time (TED, arXiv 2303.06318, section 4).

A tile is so many elements; a large parameter is cut where a tile is full, small ones share a tile.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_ted.optim.buckets import Bucket, Piece
from lightning_ted.optim.placement import align


@dataclass(eq=False)
class Segment:
    """Elements of one parameter that are stepped by one call.

    Attributes:
        bucket: The bucket of the parameter.
        piece: Which elements.
        whole: Whether they are a whole parameter, to be stepped in its shape.
        master: What the optimizer steps, and what it files its state under: a view of the bucket's.
        weight: The working weight, flat: a view, too.

    """

    bucket: Bucket
    piece: Piece
    whole: bool
    master: Parameter
    weight: Tensor = field(init=False)

    @classmethod
    def of(cls, bucket: Bucket, piece: Piece, whole: bool) -> Segment:
        """The segment of a piece."""
        segment = cls(bucket, piece, whole, Parameter(bucket.master_of(piece)))
        segment.attach()
        return segment

    @property
    def parameter(self) -> Parameter:
        """The model's parameter."""
        return self.bucket.parameters[self.piece.index]

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.piece.size

    @property
    def state_device(self) -> torch.device:
        """Where state of its elements is kept between steps."""
        return torch.device("cpu") if self.bucket.offload else self.bucket.device

    def shaped(self, flat: Tensor) -> Tensor:
        """``flat`` as the optimizer sees it."""
        return flat.view(self.parameter.shape) if self.whole else flat

    def attach(self) -> None:
        """Let ``master`` be the memory that the bucket has now."""
        self.master.data = self.shaped(self.bucket.master_of(self.piece))
        self.weight = self.bucket.weight_of(self.piece)


@dataclass(frozen=True)
class Part:
    """A segment that is stepped, with its gradient, in a group."""

    segment: Segment
    gradient: Tensor
    group: int


@dataclass(frozen=True)
class Work:
    """A tile, and what of it is stepped: what has a gradient and belongs to a group."""

    tile: list[Segment]
    parts: list[Part]

    @classmethod
    def of(cls, tile: list[Segment], group_of: Mapping[Parameter, int]) -> Work:
        """What is to be done for a tile; ``group_of``: the index of each parameter's group."""
        parts = []
        for segment in tile:
            gradient = segment.bucket.gradient_of(segment.piece)
            group = group_of.get(segment.parameter)
            if gradient is not None and group is not None:
                parts.append(Part(segment, gradient, group))
        return cls(tile, parts)


def cut_into_tiles(buckets: Iterable[Bucket], tile_size: int | None, whole: bool) -> list[list[Segment]]:
    """This rank's pieces of ``buckets`` in tiles of ``tile_size`` elements, in order.

    Args:
        buckets: The buckets.
        tile_size: Elements of a tile, rounded up to :data:`~lightning_ted.optim.placement.ALIGNMENT`; None for all in one.
        whole: Cut no parameter: a tile ends with the parameter that fills it.

    """
    tiles: list[list[Segment]] = []
    room = 0
    # Kernels take what does not fill a vector in other instructions, which round in another way: cut between vectors.
    tile_size = None if tile_size is None else align(tile_size)
    for bucket in buckets:
        for piece in bucket.pieces:
            for part in [piece] if whole or tile_size is None else _cut(piece, room, tile_size):
                if room <= 0:
                    tiles.append([])
                    room = tile_size if tile_size is not None else 2**62
                # A number has no part, and state that is one, too.
                tiles[-1].append(Segment.of(bucket, part, whole or bucket.parameters[part.index].dim() == 0))
                room -= align(part.size)
    return tiles


def _cut(piece: Piece, room: int, tile_size: int) -> list[Piece]:
    """A piece in parts, of which the first fills ``room`` and the others are of ``tile_size``."""
    parts, start = [], piece.start
    while start < piece.stop:
        stop = min(start + (room if room > 0 else tile_size), piece.stop)
        parts.append(replace(piece, start=start, stop=stop, offset=piece.offset + start - piece.start))
        start, room = stop, 0
    return parts
