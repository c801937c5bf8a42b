import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_ted.collectives.primitives import all_reduce
from lightning_ted.errors import TEDError
from lightning_ted.mesh import SINGLE, Axis, TEDMesh
from lightning_ted.topology import AXIS_NAMES, Topology

DENSE = ("data", "tensor")
EXPERT = ("expert_data", "expert", "expert_tensor")


@contextmanager
def fake_world(topology: Topology, rank: int) -> Iterator[TEDMesh]:
    """The mesh of one rank, in a world whose other ranks do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=topology.world_size)
    try:
        yield TEDMesh(topology)
    finally:
        dist.destroy_process_group()


def check_rank(topology: Topology, rank: int) -> None:
    """The axes and both meshes of ``rank`` say what the topology says."""
    at = topology.coordinates(rank)
    with fake_world(topology, rank) as mesh:
        for name in AXIS_NAMES:
            axis, members = mesh.axis(name), topology.group(name, rank)
            assert (axis.name, axis.size, axis.rank) == (name, len(members), members.index(rank))
            assert (axis.group is None) == (len(members) == 1)
            if axis.group is not None:
                assert tuple(dist.get_process_group_ranks(axis.group)) == members
        for device_mesh, axes in ((mesh.dense, DENSE), (mesh.expert, EXPERT)):
            want = [getattr(at, name) for name in axes]
            assert device_mesh.mesh_dim_names == tuple(f"{name}_parallel" for name in axes)
            assert list(device_mesh.get_coordinate()) == want
            assert [device_mesh.get_local_rank(i) for i in range(len(axes))] == want
            for name in axes:
                group = device_mesh.get_group(f"{name}_parallel")
                assert tuple(dist.get_process_group_ranks(group)) == topology.group(name, rank)


@pytest.mark.parametrize(
    "topology",
    [
        Topology(1),
        Topology(6, 3, 2, 1),
        Topology(8, 2, 2, 2),
        Topology(8, 2, 8, 1, "data_first"),
        Topology(12, 6, 2, 3, "data_first"),
        Topology(15, 3, 5, 3),
        Topology(16, 2, 4, 2),
        Topology(16, 2, 4, 2, "data_first"),
        Topology(27, 9, 3, 3, "data_first"),
        Topology(30, 6, 5, 2),
    ],
    ids=str,
)
def test_coordinates_of_every_rank_are_those_of_the_device_meshes(topology):
    for rank in range(topology.world_size):
        check_rank(topology, rank)


LARGE = [
    Topology(384, 6, 32, 3, "data_first"),
    Topology(1000, 10, 25, 2),
    Topology(2187, 27, 81, 9, "data_first"),
    Topology(4096, 8, 64, 8),
    Topology(4096, 8, 64, 2, "data_first"),
    Topology(4096, 8, 512, 1),
]


@pytest.mark.parametrize("topology", LARGE, ids=str)
def test_device_meshes_of_large_worlds_hold_every_rank_at_its_coordinates(topology):
    with fake_world(topology, topology.world_size // 3) as mesh:
        dense, expert = mesh.dense.mesh.tolist(), mesh.expert.mesh.tolist()
        assert mesh.dense.size() == mesh.expert.size() == topology.world_size
        for rank in range(topology.world_size):
            at = topology.coordinates(rank)
            assert dense[at.data][at.tensor] == rank
            assert expert[at.expert_data][at.expert][at.expert_tensor] == rank
    for rank in (0, topology.world_size // 2 + 1, topology.world_size - 1):
        check_rank(topology, rank)


@pytest.mark.parametrize(
    "topology",
    [
        Topology(1),
        Topology(8),
        Topology(8, 8, 1, 8),
        Topology(8, 1, 8),
        Topology(8, 2, 2, 2),
        Topology(8, 4, 2, 4),
        Topology(16, 4, 4, 2, "data_first"),
    ],
    ids=str,
)
def test_a_process_group_is_made_once_for_each_distinct_set_of_ranks(topology, monkeypatch):
    made = []
    new_group = dist.new_group

    def counted(ranks, **options):
        made.append(tuple(ranks))
        return new_group(ranks, **options)

    monkeypatch.setattr(dist, "new_group", counted)
    rank = topology.world_size - 1
    sets = {topology.group(name, rank) for name in AXIS_NAMES} - {topology.group("world", rank)}
    with fake_world(topology, rank) as mesh:
        assert sorted(made) == sorted(ranks for ranks in sets if len(ranks) > 1)
        for _ in range(2):
            assert mesh.dense is mesh.dense
            assert mesh.expert is mesh.expert
        # The device meshes add at most the group of this rank alone.
        assert sorted(made) == sorted(sets)
        by_ranks: dict[tuple[int, ...], set[str]] = {}
        for name in AXIS_NAMES:
            if mesh.axis(name).size > 1:
                by_ranks.setdefault(topology.group(name, rank), set()).add(mesh.axis(name).group_name)
        assert all(len(names) == 1 for names in by_ranks.values())
        if mesh.axis("world").size > 1:
            assert mesh.axis("world").group is dist.group.WORLD


def test_a_mesh_without_a_process_group_is_a_world_of_one():
    mesh = TEDMesh(Topology(1))
    assert all(mesh.axis(name).size == 1 and mesh.axis(name).group is None for name in AXIS_NAMES)


def sums_by_axis(options: dict) -> dict[str, float]:
    """The sum of 2 ** rank over each axis's group tells which ranks took part."""
    mesh = TEDMesh(Topology(dist.get_world_size(), **options))
    sums = {}
    for name in AXIS_NAMES:
        tensor = torch.tensor(2.0**mesh.rank)
        if mesh.axis(name).group is not None:
            dist.all_reduce(tensor, group=mesh.axis(name).group)
        sums[name] = tensor.item()
    return sums


FOUR = [
    {},
    {"tensor": 2, "expert": 2, "expert_tensor": 2},
    {"tensor": 2, "expert": 2, "expert_tensor": 1},
    {"tensor": 2, "expert": 2, "expert_tensor": 1, "order": "data_first"},
    {"tensor": 4, "expert": 1, "expert_tensor": 2, "order": "data_first"},
    {"tensor": 4, "expert": 4, "expert_tensor": 1},
]


@pytest.mark.parametrize("options", FOUR, ids=str)
def test_the_groups_of_every_axis_join_the_right_ranks(pools, options):
    topology = Topology(4, **options)
    for rank, sums in enumerate(pools(4).run(sums_by_axis, options)):
        assert sums == {name: sum(2.0**peer for peer in topology.group(name, rank)) for name in AXIS_NAMES}


def sums_by_device_mesh(options: dict) -> dict[str, float]:
    mesh = TEDMesh(Topology(dist.get_world_size(), **options))
    sums = {}
    for device_mesh, axes in ((mesh.dense, DENSE), (mesh.expert, EXPERT)):
        for name in axes:
            tensor = torch.tensor(2.0**mesh.rank)
            dist.all_reduce(tensor, group=device_mesh.get_group(f"{name}_parallel"))
            sums[name] = tensor.item()
    return sums


def test_the_groups_of_the_device_meshes_join_the_right_ranks(pools):
    options = FOUR[3]
    for rank, sums in enumerate(pools(4).run(sums_by_device_mesh, options)):
        assert sums == {
            name: sum(2.0**peer for peer in Topology(4, **options).group(name, rank)) for name in (*DENSE, *EXPERT)
        }


def second_mesh_in_one_world() -> float:
    for _ in range(2):
        mesh = TEDMesh(Topology(dist.get_world_size(), tensor=2, expert=2))
        total = torch.ones(())
        dist.all_reduce(total, group=mesh.axis("tensor").group)
        dist.all_reduce(total, group=mesh.axis("expert").group)
    return total.item()


def test_a_second_mesh_may_be_made_in_the_same_world(pools):
    assert pools(4).run(second_mesh_in_one_world) == [4.0] * 4


def copies_of_an_attached_axis() -> None:
    axis = TEDMesh(Topology(dist.get_world_size(), tensor=2)).axis("tensor")
    assert axis.group_name == axis.group.group_name

    module = torch.nn.Linear(2, 2)
    module.axis = axis
    assert copy.deepcopy(module).axis is axis
    assert copy.deepcopy([axis, axis]) == [axis, axis]

    described = pickle.loads(pickle.dumps(module)).axis
    assert (described.name, described.size, described.rank) == ("tensor", 2, dist.get_rank() % 2)
    assert described.group is None
    # Whoever took None for a group would communicate with the whole world.
    for attribute in ("group_name", "attached_group"):
        with pytest.raises(
            TEDError, match=r"^the 'tensor' axis of size 2 is not attached to a process group: .* pickled"
        ):
            getattr(described, attribute)


def test_copies_share_an_axis_and_pickles_describe_it(pools):
    pools(2).run(copies_of_an_attached_axis)


def test_a_mesh_ends_with_its_process_group_and_is_not_pickled():
    with fake_world(Topology(4, 2), 1) as mesh:
        assert mesh.is_alive
        assert copy.deepcopy(mesh) is mesh
        assert pickle.loads(pickle.dumps(mesh)) is None
    assert not mesh.is_alive
    with fake_world(Topology(4, 2), 1):
        assert not mesh.is_alive
    assert TEDMesh(Topology(1)).is_alive


def test_single_is_an_axis_of_one_rank_without_a_group():
    assert (SINGLE.size, SINGLE.rank, SINGLE.group) == (1, 0, None)
    assert copy.deepcopy(SINGLE) is SINGLE


def test_axes_are_compared_by_identity():
    assert Axis("tensor", 2, 0) != Axis("tensor", 2, 0)


def test_recording_ends_with_its_context():
    mesh = TEDMesh(Topology(1))
    outer, inner = object(), object()
    with mesh.recording(outer):
        with pytest.raises(ZeroDivisionError), mesh.recording(inner) as recorder:
            assert recorder is mesh.axis("tensor").ledger.recorder is inner
            _ = 1 / 0
        assert mesh.ledger.recorder is outer
    assert mesh.axis("world").ledger.recorder is None


def gradient_groups(topology):
    mesh = TEDMesh(topology)
    made = {name: mesh.gradient_axis(name) for name in ("data", "world", "expert_data")}
    again = {name: mesh.gradient_axis(name) for name in made}
    assert all(again[name].group is axis.group for name, axis in made.items())
    for name, axis in made.items():
        plain = mesh.axis(name)
        assert (axis.size, axis.rank, axis.name) == (plain.size, plain.rank, plain.name)
        if axis.size > 1:
            assert dist.get_process_group_ranks(axis.group) == dist.get_process_group_ranks(plain.group)
    used = {mesh.axis(name).group for name in AXIS_NAMES}
    return {name: axis.size == 1 or axis.group not in used for name, axis in made.items()}


@pytest.mark.parametrize("topology", [Topology(4, 1, 4), Topology(4, 2, 2), Topology(4, 2, 4, 1), Topology(4, 4, 1, 4)])
def test_gradients_are_reduced_in_groups_of_their_own(pools, topology):
    for rank in pools(4).run(gradient_groups, topology):
        assert all(rank.values())


def node_groups() -> tuple[list[int], list[int], list[int]]:
    mesh = TEDMesh(Topology(4, expert=4), ranks_per_node=2)
    inside, across = mesh.node_axes("expert")
    found = [sorted(dist.get_process_group_ranks(axis.attached_group)) for axis in (inside, across)]
    sums = [all_reduce(torch.tensor(dist.get_rank()), axis).item() for axis in (inside, across)]
    return found[0], found[1], [*map(int, sums)]


def test_an_axis_is_split_into_a_part_inside_the_node_and_one_across(pools):
    found = pools(4).run(node_groups)
    assert found == [
        ([0, 1], [0, 2], [1, 2]),
        ([0, 1], [1, 3], [1, 4]),
        ([2, 3], [0, 2], [5, 2]),
        ([2, 3], [1, 3], [5, 4]),
    ]
