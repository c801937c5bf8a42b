from collections import Counter

import torch

from lightning_ted.checkpoint.portions import Portion, Portions, shared_out
from lightning_ted.layout import Cut, ParamLayout
from lightning_ted.mesh import TEDMesh
from lightning_ted.topology import Topology


def test_ranges_become_views_that_reach_all_they_hold() -> None:
    layout = ParamLayout("w", (3, 4))
    flat = torch.zeros(10)
    portion = Portions(TEDMesh(Topology(1))).of_ranges([(1, flat[:4]), (5, flat[4:])], layout, torch.float32)
    assert portion.nbytes == flat.nbytes
    for tensor in portion.tensors:
        tensor.fill_(1)
    assert flat.sum() == 10


def test_a_part_in_another_order_of_memory_is_not_copied() -> None:
    tensor = torch.zeros(4, 3).t()
    portion = Portions(TEDMesh(Topology(1))).of_part(tensor, ParamLayout("w", (3, 4)))
    assert portion.tensors[0].data_ptr() == tensor.data_ptr() and portion.tensors[0].shape == (3, 4)


def test_a_part_of_a_fused_dimension_is_several_boxes() -> None:
    layout = ParamLayout("w", (4, 2), (Cut(0, "tensor", 1, (2, 2)),))
    portion = Portion(layout.global_shape, torch.float32)
    portion.add(
        torch.zeros(4, 2), portion_box := next(iter(Portion.whole(torch.zeros(4, 2)).boxes)), layout, {"tensor": 0}
    )
    assert portion_box.numel == 8
    assert [box.offsets for box in portion.boxes] == [(0, 0), (2, 0)]


def test_each_tensor_is_written_by_one_of_its_holders_in_about_equal_shares() -> None:
    sizes = {f"w{n}": 10 + n for n in range(20)}
    members = [1, 3, 5]
    chosen = [shared_out(sizes, members, rank) for rank in members]
    assert Counter(name for names in chosen for name in names) == Counter(sizes.keys())
    load = [sum(sizes[name] for name in names) for names in chosen]
    assert max(load) - min(load) <= max(sizes.values())
