"""The strategy: the hooks that a ``Trainer`` calls, each handed on to the module that knows."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from importlib import import_module
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_ted.adapters import MoESpec
from lightning_ted.collectives.tape import KeepPolicy
from lightning_ted.mesh import TEDMesh
from lightning_ted.moe.expert_parallel import ExpertParallelLayer, expert_parallel_layers
from lightning_ted.optim.options import TrainingOptions
from lightning_ted.recompute import CheckpointMode, RecomputeOptions, check_blocks, checkpoint_blocks
from lightning_ted.strategy import _compat, checks, data, metrics
from lightning_ted.strategy._compat import is_overridden
from lightning_ted.strategy.arguments import OF_THE_TRAINER, check_arguments
from lightning_ted.strategy.batchnorm import synchronize_layers
from lightning_ted.strategy.buffers import synchronize_buffers
from lightning_ted.strategy.hints import add_hint
from lightning_ted.strategy.loading import LoadingStrategy
from lightning_ted.strategy.partition import PartitionOptions, close_regions, mesh_of, partition_module
from lightning_ted.strategy.registry import NAME
from lightning_ted.strategy.sizes import check_reuse, module_styles, resolve_sizes
from lightning_ted.tensor_parallel.plan import Style
from lightning_ted.topology import RankOrder, Topology


class TEDStrategy(LoadingStrategy):
    r"""Trains models with mixture-of-experts layers under tensor + expert + data parallelism (arXiv 2303.06318).

    The same ranks are arranged twice: ``tensor x data`` for ordinary layers, ``expert-tensor x expert x expert-data`` for
    experts. Parameters are cut in place before any ``setup`` hook runs, and hooks see this rank's parts; only checkpoint
    files hold full tensors.

    Arguments:
        tensor_parallel_size: Ranks that share each ordinary layer; ``"auto"`` takes the largest number that divides the
            attention heads and all else that the plan cuts, and stays within a node.
        expert_parallel_size: Ranks that share out the experts of a layer; ``"auto"`` takes the largest legal number.
        expert_tensor_parallel_size: Ranks that share each expert. ``None`` means ``tensor_parallel_size``, as in the paper;
            1 folds the tensor ranks into the expert axis.
        rank_order: ``"expert_first"`` puts the ranks of an expert-parallel group next to each other, ``"data_first"`` the
            replicas of an expert.
        sequence_parallel: Split activations over tokens between the tensor-parallel regions.
        duplicate_token_dropping: Route each token on one tensor rank only. ``False`` is for ablation.
        activation_checkpointing: ``"full"`` makes the activations of the model's blocks again in backward; ``"comm_aware"`` does
            so without communicating again (the paper's section 5.2). ``None`` keeps them.
        activation_checkpointing_policy: Classes of the blocks, or their names; ``None`` finds the repeated ones.
        comm_aware_policy: Of which collectives ``"comm_aware"`` keeps the outcome: of ``"all"``, so that the recomputation sends
            nothing; of all but all-gathers (``"default"``); or of ``"all_to_all"`` ones, which cross nodes.
        moe_overlap_chunks: Send the tokens of a MoE layer in so many chunks, so that experts compute on one while the next is
            under way.
        moe_dispatcher: ``"all_to_all"`` sends tokens to their experts directly, ``"hierarchical"`` inside the node first, then
            across nodes.
        moe_specs: Where router and experts are in MoE blocks of your own, one :class:`~lightning_ted.MoESpec` for each kind of
            block.
        record_communication: Count what is sent, for :attr:`communication`.
        zero_stage: 1 shares out the optimizers' state (and the 32-bit weights of 16-bit training) over the data-parallel ranks
            of each parameter; 2 also frees the gradients that a rank does not step.
        optimizer_tile_size: Elements that are stepped at a time, which bounds what a step needs beside the state; ``None``
            steps all at once.
        offload_optimizer: Keep the optimizers' state, and the 32-bit weights of 16-bit training, in host memory; tiles of it
            visit the device.
        fp32_gradients: Accumulate and reduce the gradients of 16-bit weights in fp32.
        overlap_weight_gather: Let updated weights arrive while the next forward computes. Between a step and the next forward,
            only hooks of evaluations and checkpoints may then read weights.
        tensor_parallel_plan: ``"auto"`` uses the ``tp_plan`` attributes of the model's modules; otherwise a style for each
            name pattern.
        save_distributed_checkpoint: Write checkpoints as directories, to which each rank writes its parts and which any layout
            reads; ``False``: as one plain ``.ckpt`` file, which any strategy reads. Both are read, whatever this is.
        async_save: Go on while a directory is written, from a copy in host memory; the next save waits for it.
        exclude_frozen_parameters: Leave out of checkpoints the parameters that require no gradient, such as those of a model whose
            adapters are trained, and let a checkpoint that is loaded lack them: the model keeps its own.
        accelerator: The accelerator; usually left to the ``Trainer``.
        parallel_devices: The devices of this node; usually left to the ``Trainer``.
        cluster_environment: Where ranks and addresses come from; usually left to the ``Trainer``.
        checkpoint_io: How checkpoint files are written and read.
        precision_plugin: The precision; usually left to the ``Trainer``.
        process_group_backend: torch.distributed's backend; by default the one for the device.
        timeout: How long a collective may take before it fails.

    """

    strategy_name = NAME

    def __init__(
        self,
        tensor_parallel_size: int | Literal["auto"] = 1,
        expert_parallel_size: int | Literal["auto"] = "auto",
        expert_tensor_parallel_size: int | None = None,
        rank_order: RankOrder = "expert_first",
        sequence_parallel: bool = False,
        duplicate_token_dropping: bool = True,
        activation_checkpointing: CheckpointMode | None = None,
        activation_checkpointing_policy: list[str | type[torch.nn.Module]] | str | None = None,
        comm_aware_policy: KeepPolicy = "all",
        moe_overlap_chunks: int = 1,
        moe_dispatcher: str = "all_to_all",
        moe_specs: list[MoESpec] | None = None,
        record_communication: bool = False,
        zero_stage: int = 1,
        optimizer_tile_size: int | None = 2**24,
        offload_optimizer: bool = False,
        fp32_gradients: bool = False,
        overlap_weight_gather: bool = False,
        tensor_parallel_plan: Literal["auto"] | dict[str, str] = "auto",
        save_distributed_checkpoint: bool = True,
        async_save: bool = False,
        exclude_frozen_parameters: bool = False,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = _compat.default_pg_timeout,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        check_arguments(arguments)
        self._arguments = arguments
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self._options = PartitionOptions(
            tensor_parallel_plan,
            sequence_parallel,
            duplicate_token_dropping,
            moe_dispatcher,
            moe_overlap_chunks,
            tuple(moe_specs or ()),
        )
        self._recompute = (
            RecomputeOptions(activation_checkpointing, comm_aware_policy) if activation_checkpointing else None
        )
        self._recomputed_blocks = activation_checkpointing_policy
        #: Whether what is sent is counted; may be switched at any time.
        self.record_communication = record_communication
        self._training_options = TrainingOptions(
            zero_stage, optimizer_tile_size, offload_optimizer, fp32_gradients, overlap_weight_gather
        )
        self._save_distributed = save_distributed_checkpoint
        self._async_save = async_save
        self._exclude_frozen = exclude_frozen_parameters
        self._tensor_parallel_size = tensor_parallel_size
        self._expert_parallel_size = expert_parallel_size
        self._expert_tensor_parallel_size = expert_tensor_parallel_size
        self._rank_order = rank_order
        self._configured = False
        self._checked_stages: set[str] = set()
        self._described = False
        self._moe_layers: list[ExpertParallelLayer] = []

    def verify(self, module: pl.LightningModule, batch: Any, **options: Any) -> Any:
        """Whether a module computes under this layout what it computes in one process, found out on local CPU processes.

        The same as :func:`lightning_ted.verify.verify`, with this strategy's arguments.

        Args:
            module: In float32; small enough for so many copies of it on this machine. It is not changed.
            batch: As ``training_step`` gets it, of all data ranks together.
            **options: ``processes``, ``tolerance``, ``seed``, ``timeout`` and ``trainer_options``.

        Returns:
            A :class:`~lightning_ted.verify.VerificationReport`, to be printed, or asked for ``ok``.

        Raises:
            TEDError: If the module cannot be run so.

        """
        above = import_module("lightning_ted.verify")  # which stands on this module
        return above.verify(module, batch, self.again, **options)

    @property
    def again(self) -> Callable[[], TEDStrategy]:
        """Makes a new strategy of the same layout and options."""
        return partial(TEDStrategy, **{k: value for k, value in self._arguments.items() if k not in OF_THE_TRAINER})

    # -- mesh and partition ----------------------------------------------------------------------------------------------

    @override
    def connect(self, model: pl.LightningModule) -> None:
        super().connect(model)
        self._configured = False

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        _compat.reset_seed()
        self.set_world_ranks()
        self._init_process_group()
        self._end_training()  # one that was interrupted
        self._described = False
        module = self.lightning_module
        assert module is not None
        self._make_mesh(module)
        if not self._experts_come_later(module):
            self._partition(module)
        # From here on hooks draw random numbers, such as for a split of the data.
        data.equalize_random_state(self.mesh.axis("tensor"), self.root_device)

    def _resolve(self, module: pl.LightningModule | None) -> Topology:
        return self.resolve(module, self.num_nodes * self.num_processes, self.num_processes)

    def resolve(self, module: pl.LightningModule | None, world_size: int, ranks_per_node: int) -> Topology:
        """How so many ranks would be arranged.

        Args:
            module: The module, as far as it has been built; None where there is none yet.
            world_size: Number of ranks.
            ranks_per_node: Of them, on each node.

        Raises:
            LayoutError, PlanError: If the sizes do not fit the ranks, or the module.

        """
        asked = (self._tensor_parallel_size, self._expert_parallel_size, self._expert_tensor_parallel_size)
        mesh = mesh_of(module)
        if mesh is not None:
            # The sizes that "auto" stands for were found when the layers were whole.
            check_reuse(type(module).__name__, mesh.topology, world_size, *asked, self._rank_order)
            return mesh.topology
        topology = resolve_sizes(
            module,
            world_size,
            ranks_per_node,
            *asked,
            self._rank_order,
            self._options.plan,
            complete=module is None or self._has_all_layers(module),
            specs=self._options.specs,
        )
        if module is not None and self._has_all_layers(module) and not is_overridden("setup", module):
            self._refuse_idle_sizes(module, topology)
            check_blocks(module, self._recompute, self._recomputed_blocks)
        if self._options.dispatcher == "hierarchical":
            for ranks in topology.groups("expert"):
                topology.node_groups("expert", ranks[0], ranks_per_node)
        return topology

    def _refuse_idle_sizes(self, module: pl.LightningModule, topology: Topology) -> dict[str, Style]:
        styles = module_styles(module, self._options.plan)
        checks.refuse_foreign_sequences(module, topology, self._options.sequence_parallel)
        checks.refuse_idle_sizes(
            module, styles, topology, self._expert_tensor_parallel_size, self._options.sequence_parallel
        )
        return styles

    def _has_all_layers(self, module: pl.LightningModule) -> bool:
        """False while ``configure_model`` has layers still to make."""
        return self._configured or mesh_of(module) is not None or not is_overridden("configure_model", module)

    def _experts_come_later(self, module: pl.LightningModule) -> bool:
        """Whether the largest legal expert degree can be told only when ``configure_model`` has made the experts."""
        return (
            self._expert_parallel_size == "auto"
            and not self._has_all_layers(module)
            and not expert_parallel_layers(module)
        )

    def _make_mesh(self, module: pl.LightningModule) -> None:
        topology = self._resolve(module)
        made = mesh_of(module)
        if made is not None:
            self._mesh = made  # its layers communicate on it
        elif self._mesh is None or self._mesh.topology != topology or not self._mesh.is_alive:
            self._mesh = TEDMesh(topology, self.root_device.type, self._timeout, self.num_processes)
        module._device_mesh = self._mesh.dense
        # Made now, when every rank makes it; one that asked for it alone would be alone in making groups.
        _ = self._mesh.expert

    def _partition(self, module: pl.LightningModule) -> None:
        self._layouts = partition_module(
            module, self.mesh, self._options, self.root_device, complete=self._has_all_layers(module)
        )

    @contextmanager
    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        # Without storage now, it comes tensor by tensor, when each is cut.
        with torch.device("meta") if empty_init else self.root_device, self.precision_plugin.tensor_init_context():
            yield

    @contextmanager
    @override
    def model_sharded_context(self) -> Generator[None, None, None]:
        with super().model_sharded_context():
            yield
        assert self.lightning_module is not None
        self._configured = True
        self._make_mesh(self.lightning_module)
        self._partition(self.lightning_module)

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None and self.model is not None and self.lightning_module is not None
        self.accelerator.setup(trainer)
        module = self.lightning_module
        fitting = self._is_fitting()
        if fitting and self._layer_sync is not None:
            self.model = synchronize_layers(self._layer_sync, self.model, self.mesh.axis("data"))
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        self._partition(module)  # what a `setup` hook has added
        checkpoint_blocks(self.model, self._recompute, self._recomputed_blocks)
        self._moe_layers = list(expert_parallel_layers(module).values())
        metrics.synchronize_over_data(module, self.mesh.axis("data"))
        self._checked_stages.clear()
        self.barrier("setup")
        styles = self._refuse_idle_sizes(module, self.topology)
        if fitting:
            checks.warn_of_overrides(trainer, module)
            checks.refuse_early_copies(trainer, module, self.topology)
            checks.refuse_sparse_gradients(module)
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if not self._described:
            checks.warn_of_idle_sizes(module, styles, self.topology, self._tensor_parallel_size)
            checks.warn_of_idle_dispatch(self.topology, self._options, self.num_processes)
            checks.warn_of_likenesses(module)
            rank_zero_info(checks.describe(module, self._layouts, self.topology))
            self._described = True
        data.equalize_random_state(self.mesh.axis("tensor"), self.root_device)

    @override
    def post_training_step(self) -> None:
        assert self.lightning_module is not None
        close_regions(self.lightning_module)
        for layer in self._moe_layers:
            layer.end_step()

    on_test_end = on_predict_end = post_training_step

    @override
    def on_validation_end(self) -> None:
        self.post_training_step()
        super().on_validation_end()

    # -- data -----------------------------------------------------------------------------------------------------------

    @override
    def process_dataloader(self, dataloader: object) -> object:
        if self._is_fitting() and self._stage() != RunningStage.TRAINING:
            self._lend_generator(dataloader)
        return data.seed_workers(dataloader, self.data_parallel_rank)

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        stage = self._stage()
        if stage not in self._checked_stages:
            self._checked_stages.add(stage)
            data.check_same_batch(batch, stage, self.mesh, self.root_device)
        return super().batch_to_device(batch, device, dataloader_idx)

    def _stage(self) -> str:
        assert self.lightning_module is not None
        stage = self.lightning_module.trainer.state.stage
        return "unknown" if stage is None else str(stage.value)

    def _synchronize_buffers(self) -> None:
        assert self.lightning_module is not None
        self._wait_for_weights()
        synchronize_buffers(self.lightning_module, self._layouts, self.mesh.axis("data"), self.root_device)

    on_test_start = on_predict_start = _synchronize_buffers

    @override
    def on_validation_start(self) -> None:
        self._synchronize_buffers()
        super().on_validation_start()

    # -- the end -------------------------------------------------------------------------------------------------------

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        add_hint(exception)

    @override
    def teardown(self) -> None:
        # No collective here: after an error, the failing rank alone comes this way.
        if self._training is not None:
            self._training.close()
        module = self._lightning_module
        trainer = module._trainer if module is not None else None
        if self._layer_sync is not None and trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            assert self.model is not None
            self.model = self._layer_sync.revert(self.model)
        if module is not None and any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
            # What was never given storage cannot be moved to the CPU, and trying to would hide the reason.
            self._lightning_module = None
        if self.model is not None:
            checkpoint_blocks(self.model, None)  # another strategy may have the model next
        super().teardown()
        self._lightning_module = module
