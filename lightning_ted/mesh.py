"""From ``Topology`` to process groups and torch's ``DeviceMesh``.

One process group is made for each distinct set of ranks, however many axes use it: where the expert-tensor axis holds
the same ranks as the tensor axis, both share one communicator.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lightning_ted.errors import TEDError
from lightning_ted.topology import AXIS_NAMES, AxisName, Topology

#: How long others wait on :meth:`TEDMesh.host_group` while one rank writes to disk, which takes longer than a collective.
_HOST_TIMEOUT = timedelta(hours=2)


@dataclass
class Ledger:
    """Where the axes of one mesh find the recorder that counts their traffic; ``None`` costs nothing."""

    recorder: Any = None


@dataclass(frozen=True, eq=False)
class Axis:
    """This rank's group on one axis of the mesh: what a collective needs to know, and all that a module keeps.

    Copies of a module share their axes (a process group cannot be copied), and a pickled axis is a description: it
    keeps size and rank, and cannot communicate.
    """

    name: str
    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = field(default=None, repr=False)
    ledger: Ledger = field(default_factory=Ledger, repr=False)

    @property
    def attached_group(self) -> dist.ProcessGroup:
        """The group, for those who would take None for the whole world.

        Raises:
            TEDError: If there is none.

        """
        if self.group is None:
            raise TEDError(
                f"the {self.name!r} axis of size {self.size} is not attached to a process group: what it belongs to has been "
                "pickled. Build the module anew, and load a checkpoint into it to keep the weights."
            )
        return self.group

    @property
    def group_name(self) -> str:
        """The registered name of the group, as the functional collectives want it."""
        return self.attached_group.group_name

    def __deepcopy__(self, memo: dict[int, Any]) -> Axis:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (Axis, (self.name, self.size, self.rank))


#: An axis of one rank, on which nothing is ever sent.
SINGLE = Axis("single")


class TEDMesh:
    """The process groups of one rank, on every axis of a topology.

    Args:
        topology: The arrangement of the ranks.
        device_type: ``"cpu"`` or ``"cuda"``: where the meshes' tensors live.
        timeout: How long a collective may take before it fails.
        ranks_per_node: Consecutive ranks that share a node; None means all.

    ``dense`` is a :class:`~torch.distributed.device_mesh.DeviceMesh` with the axes ``data_parallel`` and
    ``tensor_parallel``; ``expert`` one with ``expert_data_parallel``, ``expert_parallel`` and
    ``expert_tensor_parallel``. Every rank has to make the mesh, and to ask for these two in the same order, because both
    make process groups.

    """

    def __init__(
        self,
        topology: Topology,
        device_type: str = "cpu",
        timeout: timedelta | None = None,
        ranks_per_node: int | None = None,
    ) -> None:
        self.topology = topology
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.ledger = Ledger()
        self._device_type = device_type
        self._timeout = timeout
        self._ranks_per_node = topology.world_size if ranks_per_node is None else ranks_per_node
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self._gradient_groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self._host_group: dist.ProcessGroup | None = None
        self._world = _current_world()
        if self._world is not None:
            self._groups[topology.group("world", self.rank)] = self._world
        self._axes = {name: self._make_axis(name) for name in AXIS_NAMES}
        self._meshes: dict[str, DeviceMesh] = {}

    def axis(self, name: AxisName) -> Axis:
        """This rank's group on one axis."""
        return self._axes[name]

    def gradient_axis(self, name: AxisName) -> Axis:
        """The same ranks as :meth:`axis`, for reductions that run beside the backward pass.

        One process group makes its collectives one after the other, in the order in which they were asked for; so gradients
        neither wait for a layer's collectives nor come between them. Every rank has to ask for the same axes in the same order,
        because that makes process groups.
        """
        axis = self._axes[name]
        ranks = self.topology.group(name, self.rank)
        if axis.size == 1:
            return axis
        if ranks not in self._gradient_groups:
            self._gradient_groups[ranks] = self._new_group(ranks)
        return replace(axis, group=self._gradient_groups[ranks])

    def node_axes(self, name: AxisName) -> tuple[Axis, Axis]:
        """The part of an axis that lies in this node, and its ranks at this rank's place in every node. A collective.

        Raises:
            LayoutError: If the axis has not the same number of ranks in each of its nodes.

        """
        inside, across = self.topology.node_groups(name, self.rank, self._ranks_per_node)
        return self._axis_of(f"{name}_inside", inside), self._axis_of(f"{name}_across", across)

    def host_group(self) -> dist.ProcessGroup | None:
        """A group of all ranks for objects in host memory, which a thread may use beside the other groups; None without processes.

        Every rank has to ask for it, because that makes a process group.
        """
        if self._world is None:
            return None
        if self._host_group is None:
            self._host_group = dist.new_group(timeout=_HOST_TIMEOUT, backend="gloo", group_desc="ted_host")
        return self._host_group

    @property
    def is_alive(self) -> bool:
        """Whether the processes are still joined as they were when the mesh was made."""
        return self._world is _current_world()

    def __deepcopy__(self, memo: dict[int, Any]) -> TEDMesh:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (_pickled_mesh, ())

    @property
    def dense(self) -> DeviceMesh:
        """The ranks as data x tensor."""
        shape = (self.topology.data, self.topology.tensor)
        return self._device_mesh("dense", torch.arange(self.topology.world_size).view(shape), ("data", "tensor"))

    @property
    def expert(self) -> DeviceMesh:
        """The ranks as expert-data x expert x expert-tensor."""
        top = self.topology
        ranks = torch.arange(top.world_size)
        if top.order == "expert_first":
            ranks = ranks.view(top.expert_data, top.expert, top.expert_tensor)
        else:
            # Made contiguous, because a mesh reads its layout from the strides.
            ranks = ranks.view(top.expert, top.expert_data, top.expert_tensor).transpose(0, 1).contiguous()
        return self._device_mesh("expert", ranks, ("expert_data", "expert", "expert_tensor"))

    @contextmanager
    def recording(self, recorder: Any) -> Iterator[Any]:
        """Count the collectives of this mesh in ``recorder`` within the context."""
        before, self.ledger.recorder = self.ledger.recorder, recorder
        try:
            yield recorder
        finally:
            self.ledger.recorder = before

    def _make_axis(self, name: AxisName) -> Axis:
        return self._axis_of(name, self.topology.group(name, self.rank))

    def _axis_of(self, name: str, ranks: tuple[int, ...]) -> Axis:
        group = self._group(ranks) if len(ranks) > 1 else None
        return Axis(name, len(ranks), ranks.index(self.rank), group, self.ledger)

    def _group(self, ranks: tuple[int, ...]) -> dist.ProcessGroup:
        if ranks not in self._groups:
            self._groups[ranks] = self._new_group(ranks)
        return self._groups[ranks]

    def _new_group(self, ranks: tuple[int, ...]) -> dist.ProcessGroup:
        # Only the members meet to make a group: a world-wide round for each of the world's groups would take
        # thousands of rounds on a large machine.
        return dist.new_group(list(ranks), timeout=self._timeout, use_local_synchronization=True, group_desc="ted")

    def _device_mesh(self, key: str, ranks: torch.Tensor, axes: tuple[AxisName, ...]) -> DeviceMesh:
        if key not in self._meshes:
            # torch's mesh wants a group for every axis, those of one rank included.
            groups = [self._group(self.topology.group(name, self.rank)) for name in axes]
            names = tuple(f"{name}_parallel" for name in axes)
            self._meshes[key] = DeviceMesh.from_group(groups, self._device_type, mesh=ranks, mesh_dim_names=names)
        return self._meshes[key]


def _current_world() -> dist.ProcessGroup | None:
    return dist.group.WORLD if dist.is_initialized() else None


def _pickled_mesh() -> None:
    """What a pickled mesh becomes: process groups do not outlive their processes."""
