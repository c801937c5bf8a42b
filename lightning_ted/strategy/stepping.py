"""The part of the strategy that trains: precision, gradients and optimizers."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ted.collectives.phase import during
from lightning_ted.collectives.recorder import CommRecorder
from lightning_ted.errors import UnsupportedError
from lightning_ted.layout import ParamLayout
from lightning_ted.optim.options import TrainingOptions
from lightning_ted.optim.sharded import unshard_optimizer
from lightning_ted.strategy import checks
from lightning_ted.strategy.arrival import wait_for_own, wait_in_forward
from lightning_ted.strategy.communication import StepTraffic
from lightning_ted.strategy.partition import PartitionOptions
from lightning_ted.strategy.precision import for_shards, working_dtypes
from lightning_ted.strategy.ranks import RankedStrategy
from lightning_ted.strategy.training import Training


class SteppingStrategy(RankedStrategy):
    """A strategy that reduces gradients and shares out the optimizers' steps."""

    _options: PartitionOptions
    _training_options: TrainingOptions
    #: Whether what is sent is counted, for :attr:`communication`; may be switched at any time.
    record_communication: bool = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._layouts: dict[str, ParamLayout] = {}
        self._names_at_connect: list[tuple[Parameter, str]] = []
        self._training: Training | None = None
        self._traffic = StepTraffic()

    @property
    def layouts(self) -> dict[str, ParamLayout]:
        """How each parameter and buffer is cut, by qualified name."""
        return self._layouts

    @property
    def communication(self) -> CommRecorder:
        """What this rank sent in the last step of training: calls and bytes by kind, axis and phase.

        A step is everything from the first of the batches that it accumulates to the step of the optimizer, or of all optimizers
        that step in the same batch; evaluations in between are no part of it. In ``kept``, what regions of communication-aware
        checkpointing kept at once: that of the micro-batch with the most. The object is not changed by later steps.

        Raises:
            UnsupportedError: Unless ``record_communication`` is set; or if no step has been counted from its beginning.

        """
        return self._traffic.read(self.record_communication)

    def _counted(self) -> AbstractContextManager[None]:
        return self._traffic.counted(self.mesh.ledger, self.record_communication)

    @override
    def connect(self, model: pl.LightningModule) -> None:
        super().connect(model)
        self._names_at_connect = [(p, name) for name, p in model.named_parameters(remove_duplicate=False)]

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        self._reset_optimizers_and_schedulers()
        self._traffic = StepTraffic()
        assert self.lightning_module is not None
        module, layouts = self.lightning_module, self._layouts
        named = dict(module.named_parameters())
        working = working_dtypes(self.precision_plugin, module)
        checks.refuse_averaging_of_rounded_weights(trainer, working)
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            unshard_optimizer(optimizer)  # one from an earlier run
        checks.replace_parameters(self.optimizers, module, self._names_at_connect)
        self._training = Training(
            named,
            self.mesh,
            layouts,
            self._options,
            self._training_options,
            working,
            self.root_device,
        )
        self._training.shard(self.optimizers, checks.needs_whole_parameters)
        checks.warn_of_unstepped(module, self.optimizers)
        if self._training_options.overlap_weights:
            checks.refuse_averaging_of_late_weights(trainer)
            self._training.hooks += wait_in_forward(module, self._training.bucket_of)

    @override
    def on_train_start(self) -> None:
        assert self._training is not None
        self._training.adopt_new_parameters()  # hooks may have added parameter groups
        self._training.acquire()

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        assert self._training is not None and self.lightning_module is not None
        # Its `training_step` is no forward.
        wait_for_own(self.lightning_module, self._training.bucket_of)
        self._training.adopt_new_parameters()

    @override
    def on_train_end(self) -> None:
        assert self._training is not None
        self._training.release()

    def _wait_for_weights(self) -> None:
        if self._training is not None:
            self._training.wait_for_weights()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        self._wait_for_weights()
        return super().lightning_module_state_dict()

    def _end_training(self) -> None:
        if self._training is not None:
            if not self._training.is_released:
                self._training.release()
            self._training.close()
            self._training = None

    @property
    @override
    def precision_plugin(self) -> Precision:
        return self._precision_plugin if self._precision_plugin is not None else Precision()

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        # The one place where the Trainer's choice can be made aware of the mesh.
        if precision_plugin is not None:
            precision_plugin = for_shards(precision_plugin)
        self._precision_plugin = precision_plugin

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        with self._counted():
            return super().training_step(*args, **kwargs)

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        assert self.lightning_module is not None and self._training is not None
        with self._counted():
            self.pre_backward(closure_loss)
            closure_loss = self.precision_plugin.pre_backward(closure_loss, self.lightning_module)
            # Reduced before `on_after_backward`, which then sees summed gradients, as under DDP.
            with self._training.backward():
                self.precision_plugin.backward(closure_loss, self.lightning_module, optimizer, *args, **kwargs)
            closure_loss = self.precision_plugin.post_backward(closure_loss, self.lightning_module)
            self.post_backward(closure_loss)
            self._traffic.end_pass()
        return closure_loss

    @override
    def optimizer_step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        assert self.lightning_module is not None and self._training is not None
        if not self.lightning_module.automatic_optimization and self.world_size > 1:
            self._training.require_reduced(optimizer)
        with self._counted():
            result = super().optimizer_step(optimizer, *args, **kwargs)
            self._traffic.end_step()
        return result

    @contextmanager
    @override
    def block_backward_sync(self) -> Generator[None, None, None]:
        assert self._training is not None
        with self._training.reducer.blocked():
            yield

    def grad_norm(self, optimizer: Optimizer | None = None) -> Tensor:
        """The 2-norm of the gradient as one process would have it, of one optimizer's parameters or of all: 0-dim, float64.

        Every rank has to call it. Clipping uses the same number, which is computed once for the same gradients. From
        ``on_before_optimizer_step`` on, loss scaling is undone; once the gradients are clipped, it is that of the clipped ones.

        Raises:
            UnsupportedError: Outside of training.

        """
        return self._active_training().grad_norm(optimizer)

    @during("optimizer")
    def full_gradient(self, name: str) -> Tensor | None:
        """The whole gradient of a parameter, by its qualified name, as one process would have it after backward.

        Every rank has to call it, and gets the whole tensor; None if no rank has a gradient.

        Raises:
            UnsupportedError: Outside of training, or if no optimizer steps a parameter of that name.

        """
        return self._active_training().full_gradient(name)

    def update_masters(self) -> None:
        """To be called when 16-bit working weights have been changed in place by hand: lets the 32-bit ones follow them.

        Raises:
            UnsupportedError: Outside of training.

        """
        self._active_training().update_masters()

    def _active_training(self) -> Training:
        if self._training is None:
            raise UnsupportedError("There are gradients and master weights in training only, from `on_train_start` on.")
        return self._training
