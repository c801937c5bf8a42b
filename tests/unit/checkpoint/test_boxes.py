import math
import random

import pytest
import torch

from lightning_ted.checkpoint.boxes import Box, placed, rectangles
from lightning_ted.layout import Cut, ParamLayout


def _cut_out(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    return tensor[tuple(slice(start, start + size) for start, size in zip(box.offsets, box.sizes, strict=True))]


def test_rectangles_are_a_flat_range_in_order() -> None:
    chance = random.Random(0)
    for _ in range(2000):
        shape = tuple(chance.randint(1, 5) for _ in range(chance.randint(0, 4)))
        numel = math.prod(shape)
        start = chance.randint(0, numel)
        stop = chance.randint(start, numel)
        boxes = list(rectangles(shape, start, stop))
        assert len(boxes) <= max(1, 2 * len(shape) - 1)
        whole = torch.arange(numel).view(shape)
        found = [number for box in boxes for number in _cut_out(whole, box).flatten().tolist()]
        assert found == list(range(start, stop)), (shape, start, stop)


LAYOUTS = {
    "uncut": ParamLayout("w", (6, 8)),
    "rows": ParamLayout("w", (6, 8), (Cut(0, "tensor", 2, (6,)),)),
    "columns": ParamLayout("w", (6, 8), (Cut(1, "tensor", 4, (8,)),)),
    "fused rows": ParamLayout("w", (12, 8), (Cut(0, "tensor", 2, (4, 6, 2)),)),
    "experts": ParamLayout("w", (4, 12, 3), (Cut(0, "expert", 2, (4,)), Cut(1, "expert_tensor", 2, (6, 6)))),
    "number": ParamLayout("w", ()),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_boxes_of_a_part_are_what_the_layout_cuts(name: str) -> None:
    """Whatever flat ranges the ranks own, their boxes hold the elements that `ParamLayout.part` gives them."""
    layout = LAYOUTS[name]
    whole = torch.arange(math.prod(layout.global_shape)).view(layout.global_shape)
    for a in range(layout.cuts[0].degree if layout.cuts else 1):
        for b in range(layout.cuts[1].degree if len(layout.cuts) > 1 else 1):
            index = {cut.axis: (a, b)[place] for place, cut in enumerate(layout.cuts)}
            part = layout.part(whole, index).flatten()
            for start in range(0, part.numel(), 5):
                stop = min(start + 7, part.numel())
                at = start
                for box in rectangles(layout.local_shape, start, stop):
                    piece = part[at : at + box.numel].view(box.sizes)
                    at += box.numel
                    for within, of_whole in placed(box, layout, index):
                        assert torch.equal(_cut_out(piece, within), _cut_out(whole, of_whole))
                assert at == stop
