"""What training needs beside the model: the reduction of gradients, and the optimizers' shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_ted.checkpoint.contents import Ranges
from lightning_ted.collectives.whole import gather_whole
from lightning_ted.errors import UnsupportedError
from lightning_ted.layout import ParamLayout
from lightning_ted.mesh import TEDMesh
from lightning_ted.optim.buckets import Bucket
from lightning_ted.optim.options import TrainingOptions
from lightning_ted.optim.reducer import GradientReducer
from lightning_ted.optim.sharded import shard_optimizer, share_of
from lightning_ted.optim.step import ShardedStep
from lightning_ted.strategy.partition import PartitionOptions


class Training:
    """One fit of a module.

    Attributes:
        reducer: Reduces the gradients.
        bucket_of: Where updated weights may be on their way, if they may arrive late.
        hooks: What :meth:`close` removes.
        is_released: Whether the module has its weights back.

    Args:
        parameters: The parameters, cut, by qualified name.
        mesh: The mesh.
        layouts: How they are cut, by qualified name.
        partition: With which options they were cut.
        options: How they are trained.
        working: 16-bit dtype of those that are to have masters in 32 bits, by name.
        device: Where collectives take place.

    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        mesh: TEDMesh,
        layouts: Mapping[str, ParamLayout],
        partition: PartitionOptions,
        options: TrainingOptions,
        working: Mapping[str, torch.dtype],
        device: torch.device,
    ) -> None:
        self._mesh = mesh
        self._layouts = layouts
        self._options = options
        self._device = device
        self._names = {parameter: name for name, parameter in parameters.items()}
        self._working = working
        self._steps: dict[Optimizer, ShardedStep] = {}
        self.bucket_of: dict[Parameter, Bucket] = {}
        self.hooks: list[Any] = []
        self.is_released = False
        self.reducer = GradientReducer(
            mesh, layouts, _expert_duplicates(mesh, partition), options.zero_stage, options.wide_gradients
        )

    # -- optimizers ----------------------------------------------------------------------------------------------------

    def shard(self, optimizers: Sequence[Optimizer], whole: Callable[[Optimizer], bool]) -> None:
        """Share out what the optimizers step; ``whole``: whether one has to see whole parameters."""
        for optimizer in optimizers:
            self._steps[optimizer] = step = ShardedStep(
                optimizer,
                self._names,
                self.reducer,
                self._mesh,
                self._device,
                self._options,
                self._working,
                whole(optimizer),
            )
            shard_optimizer(optimizer, step)
        self._find_buckets()

    def adopt_new_parameters(self) -> None:
        """Share out what hooks have added to the optimizers or unfrozen."""
        adopted = [step.adopt() for step in self._steps.values()]
        if any(adopted):
            self._find_buckets()

    def _find_buckets(self) -> None:
        if self._options.overlap_weights:
            buckets = [bucket for step in self._steps.values() for bucket in step.buckets]
            self.bucket_of.update((parameter, bucket) for bucket in buckets for parameter in bucket.parameters)

    def _adopt_in_step(self) -> None:
        """The same between forward and backward, where a weight cannot get another dtype any more.

        Raises:
            UnsupportedError: For a parameter that would.

        """
        new = [parameter for step in self._steps.values() for parameter in step.new_parameters()]
        for parameter in new:
            name = self._names.get(parameter, "")
            if self._working.get(name, parameter.dtype) != parameter.dtype:
                raise UnsupportedError(
                    f"'{name}' has been unfrozen, or given to an optimizer, within `training_step`, where it cannot be made a "
                    "16-bit weight any more. Do it in a hook before, such as `on_train_batch_start`."
                )
        if new:
            self.adopt_new_parameters()

    def acquire(self) -> None:
        """Let the module compute with working weights."""
        self.is_released = False
        for step in self._steps.values():
            step.acquire()

    def release(self) -> None:
        """Give the module its weights back as it had them. A collective."""
        self.is_released = True
        for step in self._steps.values():
            step.release()

    def wait_for_weights(self) -> None:
        """Let the weights of the last step be there."""
        for step in self._steps.values():
            for bucket in step.buckets:
                bucket.wait_for_weights()

    def update_masters(self, state: Mapping[str, Tensor] | None = None) -> None:
        """Let masters be those in ``state`` (this rank's parts by name); None: what the module's weights have become."""
        for step in self._steps.values():
            step.update_masters(state)

    def find_masters(self) -> Callable[[Tensor], Tensor | None]:
        """Gives, for a tensor that shares memory with a working weight, this rank's part of the masters. A collective; None,
        without communicating, for other tensors.
        """
        find = self._finder()

        def master_of(tensor: Tensor) -> Tensor | None:
            found = find(tensor)
            return None if found is None else found[0].gather_master(found[1])

        return master_of

    def find_master_ranges(self) -> Callable[[Tensor], Ranges | None]:
        """The same of the ranges that this rank owns, without communicating."""
        find = self._finder()

        def masters_of(tensor: Tensor) -> Ranges | None:
            found = find(tensor)
            owned = None if found is None else found[0].masters_owned(found[1])
            if owned is None:
                return None
            bucket, parts = owned
            assert bucket.masters is not None
            return Ranges(parts, bucket.axis.name, bucket.masters.dtype)

        return masters_of

    def _finder(self) -> Callable[[Tensor], tuple[ShardedStep, Parameter] | None]:
        places = {
            (parameter.data_ptr(), parameter.shape): (step, parameter)
            for step in self._steps.values()
            for parameter in step.parameters
        }
        return lambda tensor: places.get((tensor.data_ptr(), tensor.shape))

    def close(self) -> None:
        """Listen to parameters and modules no more."""
        self.reducer.close()
        for hook in self.hooks:
            hook.remove()

    # -- gradients -----------------------------------------------------------------------------------------------------

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Reduce the gradients of the backward pass within the context, unless passes accumulate."""
        self._adopt_in_step()
        for step in self._steps.values():
            step.apply_scale()
        self.reducer.begin_pass()
        yield
        self.reducer.end_pass()

    def require_reduced(self, optimizer: Optimizer) -> None:
        """To be called before a step in manual optimization.

        Raises:
            UnsupportedError: If ``optimizer`` is about to step a gradient that has not been reduced.

        """
        if self._steps[optimizer].has_unreduced:
            raise UnsupportedError(
                f"`{type(optimizer).__name__}` is about to step parameters whose gradients have not been averaged over the ranks. "
                "In manual optimization, call `self.manual_backward(loss)`, not `loss.backward()`, and let the last pass before a "
                "step synchronise (`toggle_model(sync_grad=True)`)."
            )

    def grad_norm(self, optimizer: Optimizer | None = None) -> Tensor:
        """The norm of the gradients of one optimizer, or of all."""
        if optimizer is not None:
            return share_of(optimizer).grad_norm()
        norms = [step.grad_norm() for step in self._steps.values()]
        zero = torch.zeros((), dtype=torch.double, device=self._device)
        return norms[0] if len(norms) == 1 else torch.stack([*norms, zero]).square().sum().sqrt()

    def full_gradient(self, name: str) -> Tensor | None:
        """The whole gradient of a parameter. A collective.

        Raises:
            UnsupportedError: If no optimizer steps a parameter of that name.

        """
        for step in self._steps.values():
            for parameter in step.parameters:
                if self._names[parameter] == name:
                    part = step.local_gradient(parameter)
                    return None if part is None else gather_whole(part, self._layouts[name], self._mesh)
        raise UnsupportedError(
            f"No optimizer steps a parameter of the name '{name}', so its gradient is not averaged. The names are those of "
            "`named_parameters()`."
        )


def _expert_duplicates(mesh: TEDMesh, options: PartitionOptions) -> int:
    # Undropped, every tensor rank sends all tokens: each reaches an expert once for every one that is no shard of it.
    dropped = options.duplicate_token_dropping or options.sequence_parallel
    return 1 if dropped else mesh.topology.tensor // mesh.topology.expert_tensor
