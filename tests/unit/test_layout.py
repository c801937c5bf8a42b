import itertools

import pytest
import torch

from lightning_ted.errors import LayoutError
from lightning_ted.layout import Cut, ParamLayout


def numbered(*shape: int) -> torch.Tensor:
    """A tensor in which no two elements are equal."""
    return torch.arange(torch.Size(shape).numel()).view(shape)


CUTS = [
    ((8, 3), Cut(0, "tensor", 4, (8,))),
    ((3, 8), Cut(1, "tensor", 2, (8,))),
    ((9, 5), Cut(0, "tensor", 3, (9,))),
    ((6, 4), Cut(0, "expert", 6, (6,))),
    ((2, 12, 3), Cut(1, "expert_tensor", 3, (6, 6))),
    ((16, 2), Cut(0, "tensor", 2, (8, 4, 4))),
    ((7,), Cut(0, "tensor", 1, (7,))),
    ((0, 3), Cut(0, "tensor", 2, (0,))),
]


@pytest.mark.parametrize(("shape", "cut"), CUTS, ids=str)
def test_join_undoes_part(shape, cut):
    full = numbered(*shape)
    parts = [cut.part(full, index) for index in range(cut.degree)]
    layout = ParamLayout("weight", shape, (cut,))
    assert {tuple(part.shape) for part in parts} == {layout.local_shape}
    assert torch.equal(cut.join(parts), full)


def test_each_rank_gets_its_share_of_every_block():
    # Rows of a fused gate/up projection: four gate rows, then four up rows. Each rank needs matching halves of both.
    gate_up = torch.tensor([0, 1, 2, 3, 10, 11, 12, 13])
    cut = Cut(0, "tensor", 2, (4, 4))
    assert cut.part(gate_up, 0).tolist() == [0, 1, 10, 11]
    assert cut.part(gate_up, 1).tolist() == [2, 3, 12, 13]


def test_blocks_of_different_lengths_are_cut_each_by_itself():
    query_key_value = torch.tensor([0, 1, 2, 3, 10, 11, 20, 21])
    cut = Cut(0, "tensor", 2, (4, 2, 2))
    assert cut.part(query_key_value, 0).tolist() == [0, 1, 10, 20]
    assert cut.part(query_key_value, 1).tolist() == [2, 3, 11, 21]


def test_the_part_of_one_block_is_a_view():
    full = numbered(8, 3)
    part = Cut(0, "tensor", 4, (8,)).part(full, 2)
    assert part.untyped_storage().data_ptr() == full.untyped_storage().data_ptr()
    assert part.tolist() == full[4:6].tolist()


@pytest.mark.parametrize("blocks", [(12,), (6, 6), (6, 4, 2)])
def test_a_parameter_cut_twice_is_put_together_again_axis_by_axis(blocks):
    experts = Cut(0, "expert", 2, (4,))
    hidden = Cut(1, "expert_tensor", 2, blocks)
    layout = ParamLayout("experts.up_proj", (4, 12, 3), (experts, hidden), family="expert", replication=2)
    full = numbered(4, 12, 3)
    part = {
        (e, t): layout.part(full, {"expert": e, "expert_tensor": t, "tensor": 1, "expert_data": 1})
        for e, t in itertools.product(range(2), range(2))
    }
    assert layout.local_shape == (2, 6, 3)
    assert all(tuple(tensor.shape) == layout.local_shape for tensor in part.values())
    assert torch.equal(experts.join([hidden.join([part[e, t] for t in range(2)]) for e in range(2)]), full)
    assert torch.equal(hidden.join([experts.join([part[e, t] for e in range(2)]) for t in range(2)]), full)


def test_an_uncut_parameter_is_whole_on_every_rank():
    layout = ParamLayout("norm.weight", (5,))
    full = numbered(5)
    assert layout.local_shape == (5,)
    assert layout.part(full, {"tensor": 3}) is full


@pytest.mark.parametrize(
    ("shape", "cuts", "message"),
    [
        (
            (6, 4),
            (Cut(0, "tensor", 4, (6,)),),
            r"^dimension 0 of 'w' \(length 6\) cannot be cut over 4 ranks of the tensor axis: 6 is not a multiple of 4\.$",
        ),
        (
            (4, 8),
            (Cut(1, "expert_tensor", 4, (6, 2)),),
            r"^dimension 1 of 'w' \(length 6\) cannot be cut over 4 ranks of the expert_tensor axis: 6 is not a multiple",
        ),
        (
            (8, 4),
            (Cut(0, "tensor", 2, (4, 2)),),
            r"^dimension 0 of 'w' has length 8, not the 6 of its blocks \(4, 2\)\.$",
        ),
        (
            (8, 4),
            (Cut(0, "expert", 2, (8,)), Cut(0, "tensor", 2, (8,))),
            r"^'w' is cut twice on one dimension: 0, 0\.$",
        ),
        (
            (8, 4),
            (Cut(0, "tensor", 2, (8,)), Cut(1, "tensor", 2, (4,))),
            r"^'w' is cut twice on one axis: tensor, tensor\.$",
        ),
        ((8,), (Cut(1, "tensor", 2, (8,)),), r"^'w' of shape \(8,\) has no dimension 1 to cut\.$"),
        ((8,), (Cut(-1, "tensor", 2, (8,)),), r"^'w' of shape \(8,\) has no dimension -1 to cut\.$"),
    ],
)
def test_cuts_that_do_not_fit_say_what_does_not_fit(shape, cuts, message):
    with pytest.raises(LayoutError, match=message):
        ParamLayout("w", shape, cuts)
