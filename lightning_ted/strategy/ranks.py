"""Where a rank sits, and how ranks find and hear each other: the part of the strategy that knows no model's layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.types import ReduceOp
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies.parallel import ParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from lightning_utilities.core.rank_zero import rank_zero_only as utils_rank_zero_only
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import override

from lightning_ted.errors import LayoutError, TEDError
from lightning_ted.mesh import TEDMesh
from lightning_ted.strategy import _compat, metrics
from lightning_ted.strategy.launcher import CheckingLauncher
from lightning_ted.topology import Topology


class RankedStrategy(ParallelStrategy):
    """A strategy whose ranks are arranged by a :class:`~lightning_ted.topology.Topology`."""

    def __init__(
        self,
        accelerator: Accelerator | None,
        parallel_devices: list[torch.device] | None,
        cluster_environment: ClusterEnvironment | None,
        checkpoint_io: CheckpointIO | None,
        precision_plugin: Precision | None,
        process_group_backend: str | None,
        timeout: timedelta | None,
    ) -> None:
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        self._process_group_backend = process_group_backend
        self._timeout = timeout
        self._num_nodes = 1
        self._mesh: TEDMesh | None = None

    @abstractmethod
    def _resolve(self, module: pl.LightningModule | None) -> Topology:
        """The arrangement that was asked for, checked against the number of ranks and the model."""

    # -- where this rank sits ------------------------------------------------------------------------------------------

    @property
    def is_distributed(self) -> bool:
        """``True``; without it, Lightning would neither add distributed samplers nor synchronise logged values."""
        return True

    @property
    @override
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return self._num_nodes

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        self._num_nodes = num_nodes

    @property
    def num_processes(self) -> int:
        """Number of processes on this node."""
        return len(self.parallel_devices) if self.parallel_devices is not None else 0

    @property
    def process_group_backend(self) -> str | None:
        """torch.distributed's backend."""
        return self._process_group_backend

    @property
    def topology(self) -> Topology:
        """The arrangement of the ranks; before the processes are set up, as far as the model tells it."""
        return self._mesh.topology if self._mesh is not None else self._resolve(self.lightning_module)

    @property
    def mesh(self) -> TEDMesh:
        """The process groups of this rank."""
        if self._mesh is None:
            raise TEDError("The mesh is there once the processes have been set up, from the `setup` hook on.")
        return self._mesh

    @property
    def device_mesh(self) -> DeviceMesh:
        """The ranks as ``data_parallel x tensor_parallel``; also ``LightningModule.device_mesh``."""
        return self.mesh.dense

    @property
    def expert_mesh(self) -> DeviceMesh:
        """The ranks as ``expert_data_parallel x expert_parallel x expert_tensor_parallel``.

        Made when the processes are set up, so that one rank may ask for it alone.
        """
        return self.mesh.expert

    @property
    def data_parallel_size(self) -> int:
        """How many different batches are in flight."""
        return self.topology.data

    @property
    def data_parallel_rank(self) -> int:
        """Which of these batches is this rank's."""
        return self.topology.coordinates(self.global_rank).data

    @property
    def tensor_parallel_size(self) -> int:
        """Ranks that share each ordinary layer."""
        return self.topology.tensor

    @property
    def tensor_parallel_rank(self) -> int:
        """This rank's index among them."""
        return self.topology.coordinates(self.global_rank).tensor

    @property
    def expert_parallel_size(self) -> int:
        """Ranks that share out the experts."""
        return self.topology.expert

    @property
    def expert_parallel_rank(self) -> int:
        """This rank's index among them."""
        return self.topology.coordinates(self.global_rank).expert

    @property
    def is_data_writer(self) -> bool:
        """Whether this rank is the one of its tensor-parallel group that should write predictions: the others hold the
        same ones."""
        return self.tensor_parallel_rank == 0

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        # Ranks of an expert-parallel group hold different samples, so experts do not divide the number of replicas.
        return {"num_replicas": self.data_parallel_size, "rank": self.data_parallel_rank}

    @override
    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = CheckingLauncher(
            self.cluster_environment, self.num_processes, self.num_nodes, check=self._before_launch
        )

    def _before_launch(self, module: pl.LightningModule | None, arguments: Sequence[Any]) -> None:
        """Look at what the ``Trainer`` is about to do, before there are processes."""
        self._resolve(module)

    def set_world_ranks(self) -> None:
        """Tell the cluster environment and Lightning's rank-zero helpers which rank this is."""
        if self.cluster_environment is not None:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        rank_zero_only.rank = utils_rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]

    def _init_process_group(self) -> None:
        assert self.cluster_environment is not None
        self._process_group_backend = self._process_group_backend or _compat.default_backend_for_device(
            self.root_device
        )
        # No `device_id`: with it, NCCL makes sub-groups by splitting the world's communicator, in which every rank must take
        # part, and the mesh makes its groups among their members only.
        _compat.init_dist_connection(self.cluster_environment, self._process_group_backend, timeout=self._timeout)
        if dist.get_world_size() != self.world_size:
            raise LayoutError(
                f"torch.distributed was initialised with {dist.get_world_size()} ranks before, but `Trainer(devices="
                f"{self.num_processes}, num_nodes={self.num_nodes})` asks for {self.world_size}."
            )
        # A rank that fails early would close its connections while others still open theirs, and hide its own error.
        self.barrier("init")

    @override
    def model_to_device(self) -> None:
        assert self.model is not None
        self.model.to(self.root_device)

    @override
    def reduce(
        self, tensor: Tensor | Any, group: Any | None = None, reduce_op: ReduceOp | str | None = "mean"
    ) -> Tensor | Any:
        """Reduce a value over the data-parallel ranks, or over ``group``; the mean of whole numbers is a float64.

        Raises:
            UnsupportedError: For a ``reduce_op`` other than mean (avg), sum, max, min and product.

        """
        if not isinstance(tensor, Tensor) or self._mesh is None:
            return tensor
        axis = self._mesh.axis("data")
        size = axis.size if group is None else dist.get_world_size(group)
        name = reduce_op if isinstance(reduce_op, str) else getattr(reduce_op, "name", str(reduce_op or "sum"))
        return metrics.reduce_over(tensor, axis.group if group is None else group, size, name)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether ``all`` ranks of the world (or any) decided so."""
        if not _compat.distributed_is_initialized():
            return decision
        votes = torch.tensor(int(decision), device=self.root_device)
        dist.all_reduce(votes, dist.ReduceOp.MIN if all else dist.ReduceOp.MAX)
        return bool(votes)

    @override
    def barrier(self, name: str | None = None) -> None:
        if not _compat.distributed_is_initialized():
            return
        if dist.get_backend() == "nccl":
            dist.barrier(device_ids=[self.root_device.index])
        else:
            dist.barrier()

    @override
    def broadcast(self, obj: _compat.TBroadcast, src: int = 0) -> _compat.TBroadcast:
        if not _compat.distributed_is_initialized():
            return obj
        holder = [obj]
        dist.broadcast_object_list(holder, src)
        return holder[0]
