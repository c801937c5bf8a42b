"""The strategy: the hooks that a ``Trainer`` calls, each handed on to the module that knows."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ted.checkpoint.single_file import OPTIMIZER_STATES, SingleFile, reading
from lightning_ted.errors import UnsupportedError
from lightning_ted.layout import ParamLayout
from lightning_ted.mesh import TEDMesh
from lightning_ted.moe.layer import moe_layers
from lightning_ted.optim.clip import clip_by_norm_
from lightning_ted.strategy import _compat, checks, data, metrics
from lightning_ted.strategy._compat import is_overridden
from lightning_ted.strategy.arguments import check_arguments
from lightning_ted.strategy.backward import BackwardSync, NamedParameters, make_backward_sync
from lightning_ted.strategy.batchnorm import synchronize_layers
from lightning_ted.strategy.buffers import synchronize_buffers
from lightning_ted.strategy.hints import add_hint
from lightning_ted.strategy.partition import PartitionOptions, close_regions, mesh_of, partition_module
from lightning_ted.strategy.precision import with_global_clipping
from lightning_ted.strategy.ranks import RankedStrategy
from lightning_ted.strategy.registry import NAME
from lightning_ted.strategy.sizes import check_reuse, module_styles, resolve_sizes
from lightning_ted.tensor_parallel.plan import Style
from lightning_ted.topology import RankOrder, Topology


class TEDStrategy(RankedStrategy):
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
        tensor_parallel_plan: ``"auto"`` uses the ``tp_plan`` attributes of the model's modules; otherwise a style for each
            name pattern.
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
        tensor_parallel_plan: Literal["auto"] | dict[str, str] = "auto",
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = _compat.default_pg_timeout,
    ) -> None:
        check_arguments(locals())
        if sequence_parallel and not duplicate_token_dropping:
            raise UnsupportedError(
                "`sequence_parallel=True` splits the tokens before the experts, which leaves no duplicates to keep: "
                "`duplicate_token_dropping=False` cannot be had with it. Leave one of the two at its default."
            )
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self._tensor_parallel_size = tensor_parallel_size
        self._expert_parallel_size = expert_parallel_size
        self._expert_tensor_parallel_size = expert_tensor_parallel_size
        self._rank_order = rank_order
        self._options = PartitionOptions(tensor_parallel_plan, sequence_parallel, duplicate_token_dropping)
        self._layouts: dict[str, ParamLayout] = {}
        self._names_at_connect: list[tuple[Parameter, str]] = []
        self._parameters: NamedParameters = []
        self._sync: BackwardSync | None = None
        self._configured = False
        self._checked_stages: set[str] = set()
        self._described = False

    @property
    def layouts(self) -> dict[str, ParamLayout]:
        """How each parameter and buffer is cut, by qualified name."""
        return self._layouts

    # -- mesh and partition ----------------------------------------------------------------------------------------------

    @override
    def connect(self, model: pl.LightningModule) -> None:
        super().connect(model)
        self._configured = False
        self._names_at_connect = [(p, name) for name, p in model.named_parameters(remove_duplicate=False)]

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        _compat.reset_seed()
        self.set_world_ranks()
        self._init_process_group()
        self._described = False
        module = self.lightning_module
        assert module is not None
        self._make_mesh(module)
        if not self._experts_come_later(module):
            self._partition(module)
        # From here on hooks draw random numbers, such as for a split of the data.
        data.equalize_random_state(self.mesh.axis("tensor"), self.root_device)

    def _resolve(self, module: pl.LightningModule | None) -> Topology:
        world_size = self.num_nodes * self.num_processes
        asked = (self._tensor_parallel_size, self._expert_parallel_size, self._expert_tensor_parallel_size)
        mesh = mesh_of(module)
        if mesh is not None:
            # The sizes that "auto" stands for were found when the layers were whole.
            check_reuse(type(module).__name__, mesh.topology, world_size, *asked, self._rank_order)
            return mesh.topology
        topology = resolve_sizes(
            module,
            world_size,
            self.num_processes,
            *asked,
            self._rank_order,
            self._options.plan,
            complete=module is None or self._has_all_layers(module),
        )
        if module is not None and self._has_all_layers(module) and not is_overridden("setup", module):
            self._refuse_idle_sizes(module, topology)
        return topology

    def _refuse_idle_sizes(self, module: pl.LightningModule, topology: Topology) -> dict[str, Style]:
        styles = module_styles(module, self._options.plan)
        checks.refuse_idle_sizes(
            module, styles, topology, self._expert_tensor_parallel_size, self._options.sequence_parallel
        )
        return styles

    def _has_all_layers(self, module: pl.LightningModule) -> bool:
        """False while ``configure_model`` has layers still to make."""
        return self._configured or mesh_of(module) is not None or not is_overridden("configure_model", module)

    def _experts_come_later(self, module: pl.LightningModule) -> bool:
        """Whether the largest legal expert degree can be told only when ``configure_model`` has made the experts."""
        return self._expert_parallel_size == "auto" and not self._has_all_layers(module) and not moe_layers(module)

    def _make_mesh(self, module: pl.LightningModule) -> None:
        topology = self._resolve(module)
        made = mesh_of(module)
        if made is not None:
            self._mesh = made  # its layers communicate on it
        elif self._mesh is None or self._mesh.topology != topology or not self._mesh.is_alive:
            self._mesh = TEDMesh(topology, self.root_device.type, self._timeout)
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
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting and self._layer_sync is not None:
            self.model = synchronize_layers(self._layer_sync, self.model, self.mesh.axis("data"))
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        self._partition(module)  # what a `setup` hook has added
        metrics.synchronize_over_data(module, self.mesh.axis("data"))
        self._parameters = list(module.named_parameters())
        self._sync = make_backward_sync(self.mesh, self._layouts, self._options)
        self._checked_stages.clear()
        self.barrier("setup")
        styles = self._refuse_idle_sizes(module, self.topology)
        if fitting:
            checks.warn_of_overrides(trainer, module)
            checks.refuse_early_copies(trainer, module, self.topology)
            checks.refuse_sparse_gradients(module)
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if fitting:
            _compat.optimizers_to_device(self.optimizers, self.root_device)
        if not self._described:
            checks.warn_of_idle_sizes(module, styles, self.topology, self._tensor_parallel_size)
            rank_zero_info(checks.describe(module, self._layouts, self.topology))
            self._described = True
        data.equalize_random_state(self.mesh.axis("tensor"), self.root_device)

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        self._reset_optimizers_and_schedulers()
        super().setup_optimizers(trainer)
        self._check_optimizers()

    def _check_optimizers(self) -> None:
        assert self.lightning_module is not None
        placed = [parameter for _, parameter in self._parameters]
        checks.check_optimizers(self.optimizers, self.lightning_module, self._names_at_connect, placed, self._layouts)

    @override
    def on_train_start(self) -> None:
        self._check_optimizers()  # hooks may have added parameter groups

    # -- gradients -----------------------------------------------------------------------------------------------------

    @property
    @override
    def precision_plugin(self) -> Precision:
        return self._precision_plugin if self._precision_plugin is not None else Precision()

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        # The one place where the Trainer's choice can be made aware of the mesh.
        if precision_plugin is not None:
            precision_plugin = with_global_clipping(precision_plugin, self._clip_by_norm)
        self._precision_plugin = precision_plugin

    def _clip_by_norm(self, parameters: list[Parameter], max_norm: float) -> None:
        layout_of = {id(parameter): self._layouts[name] for name, parameter in self._parameters}
        with_grad = [parameter for parameter in parameters if parameter.grad is not None]
        for parameter in with_grad:
            if id(parameter) not in layout_of:
                raise UnsupportedError(
                    f"A parameter of shape {tuple(parameter.shape)} cannot be clipped: when training began, it was not one of "
                    f"`{type(self.lightning_module).__name__}`, so its gradients are not averaged. Make it in `__init__`, "
                    "`configure_model` or `setup`."
                )
        pairs = [(parameter, layout_of[id(parameter)]) for parameter in with_grad]
        clip_by_norm_(pairs, max_norm, self.mesh, self.root_device)

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        assert self.lightning_module is not None and self._sync is not None
        trainable = [(name, parameter) for name, parameter in self._parameters if parameter.requires_grad]
        self.pre_backward(closure_loss)
        closure_loss = self.precision_plugin.pre_backward(closure_loss, self.lightning_module)
        self._sync.before_backward(trainable)
        self.precision_plugin.backward(closure_loss, self.lightning_module, optimizer, *args, **kwargs)
        # Before `on_after_backward`, which then sees the summed gradients, as under DDP.
        self._sync.after_backward(trainable)
        closure_loss = self.precision_plugin.post_backward(closure_loss, self.lightning_module)
        self.post_backward(closure_loss)
        return closure_loss

    @override
    def optimizer_step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        assert self.lightning_module is not None and self._sync is not None
        if not self.lightning_module.automatic_optimization and self.world_size > 1:
            self._sync.require_summed(optimizer)
        return super().optimizer_step(optimizer, *args, **kwargs)

    @contextmanager
    @override
    def block_backward_sync(self) -> Generator[None, None, None]:
        assert self._sync is not None
        with self._sync.blocked():
            yield

    @override
    def post_training_step(self) -> None:
        assert self.lightning_module is not None
        close_regions(self.lightning_module)

    on_validation_end = on_test_end = on_predict_end = post_training_step

    # -- data -----------------------------------------------------------------------------------------------------------

    @override
    def process_dataloader(self, dataloader: object) -> object:
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
        synchronize_buffers(self.lightning_module, self._layouts, self.mesh.axis("data"), self.root_device)

    on_validation_start = on_test_start = on_predict_start = _synchronize_buffers

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _single_file(self) -> SingleFile:
        # Made anew each time: moving a module to another device replaces its buffers.
        assert self.lightning_module is not None
        return SingleFile(self.lightning_module, self._layouts, self.mesh, self.root_device)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        """Write one file with full tensors. A collective: every rank calls it."""
        path = self.broadcast(filepath)
        full = self._single_file().joined(checkpoint, self.optimizers, keep=self.is_global_zero)
        super().save_checkpoint(full, path, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        with reading(checkpoint_path):
            checkpoint = super().load_checkpoint(checkpoint_path, **_compat.reading_options(weights_only))
        return self._single_file().cut(checkpoint)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        file = self._single_file()
        for optimizer, state in zip(self.optimizers, checkpoint[OPTIMIZER_STATES], strict=False):
            optimizer.load_state_dict(file.cut_optimizer_state(state, optimizer))
            _compat.optimizer_to_device(optimizer, self.root_device)

    # -- the end -------------------------------------------------------------------------------------------------------

    @override
    def on_exception(self, exception: BaseException) -> None:
        add_hint(exception)

    @override
    def teardown(self) -> None:
        # No collective here: after an error, the failing rank alone comes this way.
        module = self._lightning_module
        trainer = module._trainer if module is not None else None
        if self._layer_sync is not None and trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            assert self.model is not None
            self.model = self._layer_sync.revert(self.model)
        if module is not None and any(parameter.is_meta for parameter in module.parameters()):
            # What was never given storage cannot be moved to the CPU, and trying to would hide the reason.
            self._lightning_module = None
        super().teardown()
        self._lightning_module = module
