import itertools

import pytest

from lightning_ted.errors import LayoutError
from lightning_ted.topology import AXIS_NAMES, Coordinates, Topology, divisors

ORDERS = ("expert_first", "data_first")


def legal(world_size: int) -> list[Topology]:
    """Every topology of a world."""
    return [
        Topology(world_size, tensor, expert, expert_tensor, order)
        for tensor in divisors(world_size)
        for expert_tensor in divisors(tensor)
        for expert in divisors(world_size // expert_tensor)
        for order in ORDERS
    ]


LARGE = [
    Topology(384, 6, 32, 3, "data_first"),
    Topology(1000, 10, 25, 2, "expert_first"),
    Topology(2187, 27, 81, 9, "data_first"),
    Topology(4096, 8, 64, 8, "expert_first"),
    Topology(4096, 8, 512, 1, "data_first"),
    Topology(4096),
]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 12, 15, 16, 30, 36])
def test_groups_of_every_axis_partition_the_world(world_size):
    for topology in legal(world_size):
        for axis in AXIS_NAMES:
            check_groups(topology, axis)


@pytest.mark.parametrize("topology", LARGE, ids=str)
@pytest.mark.parametrize("axis", AXIS_NAMES)
def test_groups_of_large_worlds_partition_the_world(topology, axis):
    groups = topology.groups(axis)
    assert sorted(itertools.chain.from_iterable(groups)) == list(range(topology.world_size))
    assert {len(group) for group in groups} == {topology.size(axis)}
    # The members of a group agree on it, and on its order.
    for group in groups[:: max(1, len(groups) // 16)]:
        for rank in (group[0], group[len(group) // 2], group[-1]):
            assert topology.group(axis, rank) == group


def check_groups(topology: Topology, axis: str) -> None:
    groups = topology.groups(axis)
    assert sorted(itertools.chain.from_iterable(groups)) == list(range(topology.world_size))
    assert [group[0] for group in groups] == sorted(min(group) for group in groups)
    for group in groups:
        assert len(group) == topology.size(axis)
        assert list(group) == sorted(group)
        assert all(topology.group(axis, rank) == group for rank in group)


@pytest.mark.parametrize("world_size", [1, 6, 16, 45, 96])
def test_both_arrangements_hold_every_rank_once(world_size):
    for top in legal(world_size):
        assert top.tensor * top.data == top.expert_tensor * top.expert * top.expert_data == world_size
        at = [top.coordinates(rank) for rank in range(world_size)]
        assert len({(c.data, c.tensor) for c in at}) == world_size
        assert len({(c.expert_data, c.expert, c.expert_tensor) for c in at}) == world_size
        assert all(c.data < top.data and c.tensor < top.tensor for c in at)
        assert all(c.expert_data < top.expert_data and c.expert < top.expert for c in at)
        assert all(c.expert_tensor < top.expert_tensor for c in at)


@pytest.mark.parametrize("topology", [Topology(24, 4, 3, 2), Topology(24, 4, 3, 2, "data_first"), *LARGE[:3]], ids=str)
def test_coordinates_are_the_indices_within_the_groups(topology):
    for rank in range(0, topology.world_size, max(1, topology.world_size // 100)):
        at = topology.coordinates(rank)
        for axis in ("data", "tensor", "expert_data", "expert", "expert_tensor"):
            assert getattr(at, axis) == topology.group(axis, rank).index(rank)


@pytest.mark.parametrize("world_size", [8, 18])
def test_an_expert_tensor_group_lies_within_a_tensor_group(world_size):
    for topology in legal(world_size):
        for rank in range(world_size):
            assert set(topology.group("expert_tensor", rank)) <= set(topology.group("tensor", rank))


def test_expert_first_order_is_the_papers_example():
    topology = Topology(16, tensor=2, expert=4, expert_tensor=2)
    assert (topology.data, topology.expert_data) == (8, 2)
    assert set(topology.groups("expert")) == {(0, 2, 4, 6), (8, 10, 12, 14), (1, 3, 5, 7), (9, 11, 13, 15)}
    assert topology.groups("expert_data") == tuple((rank, rank + 8) for rank in range(8))
    assert topology.groups("expert_tensor") == topology.groups("tensor") == tuple((r, r + 1) for r in range(0, 16, 2))
    assert topology.groups("data") == (tuple(range(0, 16, 2)), tuple(range(1, 16, 2)))
    for rank in range(16):
        at = topology.coordinates(rank)
        assert rank == at.tensor + 2 * (at.expert + 4 * at.expert_data)


def test_data_first_order_puts_the_replicas_of_an_expert_side_by_side():
    topology = Topology(16, tensor=2, expert=4, expert_tensor=2, order="data_first")
    assert topology.groups("expert_data") == tuple((r, r + 2) for r in (0, 1, 4, 5, 8, 9, 12, 13))
    assert topology.groups("expert") == tuple((r, r + 4, r + 8, r + 12) for r in range(4))
    assert topology.groups("expert_tensor") == topology.groups("tensor")
    for rank in range(16):
        at = topology.coordinates(rank)
        assert rank == at.tensor + 2 * (at.expert_data + 2 * at.expert)


def test_folding_spreads_the_experts_over_the_tensor_ranks():
    topology = Topology(8, tensor=4, expert=8, expert_tensor=1)
    assert (topology.data, topology.expert_data) == (2, 1)
    assert topology.groups("expert") == (tuple(range(8)),)
    assert topology.groups("tensor") == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert topology.coordinates(6) == Coordinates(data=1, tensor=2, expert_data=0, expert=6, expert_tensor=0)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"world_size": 8, "tensor": 3},
            r"`tensor_parallel_size=3` does not divide the world size 8 .*; choose one of 1, 2, 4, 8\.$",
        ),
        (
            {"world_size": 8, "tensor": 16},
            r"`tensor_parallel_size=16` does not divide .*; choose one of 1, 2, 4, 8\.$",
        ),
        (
            {"world_size": 24, "tensor": 6, "expert_tensor": 4},
            r"`expert_tensor_parallel_size=4` does not divide `tensor_parallel_size=6`; choose one of 1, 2, 3, 6\.$",
        ),
        (
            {"world_size": 16, "tensor": 2, "expert": 3, "expert_tensor": 2},
            r"`expert_parallel_size=3` does not divide 8 \(the world size 16 / `expert_tensor_parallel_size=2`\); "
            r"choose one of 1, 2, 4, 8\.$",
        ),
        (
            {"world_size": 8, "expert": 16},
            r"`expert_parallel_size=16` does not divide 8 .*; choose one of 1, 2, 4, 8\.$",
        ),
        ({"world_size": 8, "tensor": 0}, r"^`tensor_parallel_size=0` must be a positive whole number\.$"),
        ({"world_size": 8, "expert": -2}, r"^`expert_parallel_size=-2` must be a positive whole number\.$"),
        ({"world_size": 8, "expert": 2.0}, r"^`expert_parallel_size=2\.0` must be a positive whole number\.$"),
        ({"world_size": 8, "tensor": True}, r"^`tensor_parallel_size=True` must be a positive whole number\.$"),
        ({"world_size": 0}, r"^`world_size=0` must be a positive whole number\.$"),
        (
            {"world_size": 8, "order": "E+D"},
            r"^`rank_order='E\+D'` is unknown; choose one of expert_first, data_first\.$",
        ),
    ],
)
def test_illegal_sizes_name_the_argument_and_the_legal_choices(sizes, message):
    with pytest.raises(LayoutError, match=message):
        Topology(**sizes)


@pytest.mark.parametrize("rank", [-1, 8, 9])
def test_ranks_outside_the_world_are_refused(rank):
    with pytest.raises(LayoutError, match=rf"^rank {rank} is outside the world of 8 ranks\.$"):
        Topology(8).group("data", rank)


def test_unknown_axes_are_refused():
    with pytest.raises(LayoutError, match=r"^axis 'pipeline' is unknown; choose one of world, data, tensor, "):
        Topology(8).group("pipeline", 0)


def test_divisors_are_complete_and_ascending():
    for number in range(1, 200):
        assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]


def test_groups_are_split_by_nodes():
    wide = Topology(8, expert=8)
    assert wide.node_groups("expert", 5, 4) == ((4, 5, 6, 7), (1, 5))
    assert wide.node_groups("expert", 5, 8) == (tuple(range(8)), (5,))
    assert wide.node_groups("expert", 5, 1) == ((5,), tuple(range(8)))
    assert Topology(8, expert=4, order="data_first").node_groups("expert", 3, 4) == ((1, 3), (3, 7))


def test_groups_that_lie_unevenly_on_nodes_are_refused():
    with pytest.raises(LayoutError, match=r"ranks \[0, 1, 2, 3, 4, 5, 6, 7\] lie unevenly on nodes of 6"):
        Topology(24, expert=8).node_groups("expert", 0, 6)
    assert Topology(24, expert=8).node_groups("expert", 8, 4) == ((8, 9, 10, 11), (8, 12))
