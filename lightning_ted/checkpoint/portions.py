"""What of a whole tensor lies in this rank's memory, to be written to files or read from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_ted.checkpoint.boxes import Box, placed, rectangles
from lightning_ted.layout import ParamLayout
from lightning_ted.mesh import TEDMesh


@dataclass
class Portion:
    """Some boxes of a whole tensor.

    Attributes:
        shape: Of the whole tensor.
        dtype: Of the whole tensor.
        boxes: Which boxes of it.
        tensors: What they hold (or are to hold): a tensor of each box's sizes; usually views.

    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: list[Box] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)

    @classmethod
    def whole(cls, tensor: Tensor) -> Portion:
        """All of a tensor."""
        return cls(tuple(tensor.shape), tensor.dtype, [Box.whole(tuple(tensor.shape))], [tensor])

    @property
    def nbytes(self) -> int:
        """Bytes of what lies in this rank's memory."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def add(self, tensor: Tensor, box: Box, layout: ParamLayout, index: Mapping[str, int]) -> None:
        """Add a box of this rank's part, which ``tensor`` holds."""
        for within, box_of_whole in placed(box, layout, index):
            view = tensor
            for dim, (offset, size) in enumerate(zip(within.offsets, within.sizes, strict=True)):
                view = view.narrow(dim, offset, size)
            self.boxes.append(box_of_whole)
            self.tensors.append(view)


class Portions:
    """Makes portions of one mesh's tensors.

    Args:
        mesh: The mesh, and this rank's place in it.

    """

    def __init__(self, mesh: TEDMesh) -> None:
        self._mesh = mesh

    def _index(self, layout: ParamLayout) -> dict[str, int]:
        return {cut.axis: self._mesh.axis(cut.axis).rank for cut in layout.cuts}

    def of_part(self, tensor: Tensor, layout: ParamLayout) -> Portion:
        """All of this rank's part of a parameter."""
        portion = Portion(layout.global_shape, tensor.dtype)
        portion.add(tensor.detach(), Box.whole(layout.local_shape), layout, self._index(layout))
        return portion

    def of_ranges(self, ranges: Iterable[tuple[int, Tensor]], layout: ParamLayout, dtype: torch.dtype) -> Portion:
        """Ranges of this rank's part of a parameter, seen as flat.

        Args:
            ranges: Where each begins, and its elements, flat.
            layout: How the parameter is cut.
            dtype: Of the whole tensor.

        """
        portion, index = Portion(layout.global_shape, dtype), self._index(layout)
        for start, flat in ranges:
            at = 0
            for box in rectangles(layout.local_shape, start, start + flat.numel()):
                portion.add(flat.detach()[at : at + box.numel].view(box.sizes), box, layout, index)
                at += box.numel
        return portion


def shared_out(sizes: Mapping[str, int], members: Sequence[int], rank: int) -> set[str]:
    """Which of the tensors that all ``members`` hold ``rank`` is to write: each one member, about equal bytes for each.

    Args:
        sizes: Bytes of each tensor, the same on all members.
        members: Ranks.
        rank: One of them.

    """
    load = dict.fromkeys(members, 0)
    chosen = set()
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        member = min(load, key=load.__getitem__)
        load[member] += sizes[name]
        if member == rank:
            chosen.add(name)
    return chosen
