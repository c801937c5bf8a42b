"""The part of the strategy that writes checkpoints: directories of parts, or one file of whole tensors."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

import lightning
import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ted.adapters import stacked_experts
from lightning_ted.adapters.export import INFO as HUGGINGFACE
from lightning_ted.adapters.export import described_models, write_adapters, write_pretrained
from lightning_ted.adapters.peft import adapted_models, is_of_adapters
from lightning_ted.checkpoint import directory, shards, stacked
from lightning_ted.checkpoint.contents import (
    OPTIMIZER_STATES,
    OWN,
    STATE_DICT,
    Collector,
    Contents,
    collect_rest,
    collect_state_dict,
)
from lightning_ted.checkpoint.distributed import Saver, by_first, tell_of_objects
from lightning_ted.checkpoint.optimizer_state import collect_state
from lightning_ted.checkpoint.single_file import SingleFile, write_file
from lightning_ted.checkpoint.tree import Names, require_same
from lightning_ted.errors import CheckpointError, UnsupportedError
from lightning_ted.optim.sharded import ShardedOptimizer, groups_of
from lightning_ted.strategy import _compat, data, going_on
from lightning_ted.strategy.stepping import SteppingStrategy


class SavingStrategy(SteppingStrategy):
    """A strategy that writes checkpoints."""

    _save_distributed = True
    _async_save = False
    _exclude_frozen = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._saver: Saver | None = None
        #: The random states of training, while an evaluation draws from the generators.
        self._set_aside: dict[str, Any] | None = None
        #: Those from which loaders of evaluations draw.
        self._lent: WeakSet[torch.Generator] = WeakSet()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        plain = getattr(optimizer, "_optimizer", optimizer)
        if self._save_distributed and isinstance(plain, ShardedOptimizer):
            return groups_of(plain)  # what belongs to elements goes from where it is to its files
        return super().optimizer_state(optimizer)

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        state_dict = super().lightning_module_state_dict()
        for name in self._frozen_parameters() if self._exclude_frozen else ():
            state_dict.pop(name, None)
        return state_dict

    def _frozen_parameters(self) -> dict[str, Tensor]:
        """By all their names."""
        assert self.lightning_module is not None
        named = self.lightning_module.named_parameters(remove_duplicate=False)
        return {name: parameter.detach() for name, parameter in named if not parameter.requires_grad}

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        """Write a checkpoint. A collective: every rank calls it.

        Raises:
            CheckpointError: On every rank, if it could not be written, or (``async_save``) the one before could not.

        """
        path = self.broadcast(filepath)
        local = _compat.local_path(path)
        self._saver_now().wait()
        self._finish_weights()
        if self._save_distributed:
            if local is None or storage_options is not None or type(self.checkpoint_io) is not TorchCheckpointIO:
                raise self._refusal(path, local, storage_options)
            self._saver_now().save(self._contents(checkpoint), local, self._goes_on(local))
        else:
            self._save_file(checkpoint, path, local, storage_options)

    def save_pretrained(
        self,
        path: _PATH,
        model_name: str | None = None,
        dtype: torch.dtype | None = None,
        max_shard_size: str = "5GB",
    ) -> None:
        """Write a model of Hugging Face's transformers for ``from_pretrained``: safetensors, index and configuration.

        Of a model with adapters of peft, these are written, for ``PeftModel.from_pretrained``.

        A collective: every rank calls it, while the Trainer runs or after it has. No process ever holds the model: it goes to disk
        part by part, and the ranks share the layers out. The tokenizer is the caller's to save.

        Args:
            path: A folder; the model in it is replaced once the new one has been written.
            model_name: Under which attribute the LightningModule holds the model, if it holds several.
            dtype: Of floating-point weights; None leaves those that are trained (in mixed precision, the float32 ones).
            max_shard_size: How large a file may be, such as 500MB or 5GB.

        Raises:
            CheckpointError: On every rank, if there is no such model, or it could not be written.

        """
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise CheckpointError(f"`dtype={dtype!r}` must be a floating-point dtype of torch's, or None.")
        limit, path = shards.bytes_of(max_shard_size), self.broadcast(path)
        local = _compat.local_path(path)
        if local is None:
            raise self._refusal(path, local, None)
        self._saver_now().wait()
        self._finish_weights()
        # Whole, whatever checkpoints leave out.
        state = super().lightning_module_state_dict()
        assert self.lightning_module is not None
        adapted = adapted_models(self.lightning_module)
        name = next(iter(adapted), "") if model_name is None else model_name
        if name in adapted:
            self._save_adapters(name, adapted[name], state, local)
            return
        contents = self._contents({STATE_DICT: state})
        write_pretrained(contents, local, self.mesh.host_group(), model_name, dtype, limit)

    def _save_adapters(self, name: str, model: Any, state: Mapping[str, Any], final: Path) -> None:
        prefix, parameters = f"{name}." if name else "", dict(model.named_parameters(remove_duplicate=False))
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        wanted = {f"{prefix}{key}": own[key] for key in own if is_of_adapters(f".{key}", parameters.get(key))}
        masters = {"master_of": self._training.find_masters()} if self._training is not None else {}
        file = SingleFile(self._names(), self.mesh, self.root_device)
        whole = file.joined({STATE_DICT: wanted}, (), self.is_global_zero, **masters)[STATE_DICT]
        weights = {key.removeprefix(prefix): tensor.cpu() for key, tensor in whole.items()}
        write_adapters(model, weights, final, self.mesh.host_group())

    def _finish_weights(self) -> None:
        if self._training is not None:
            self._training.wait_for_weights()
            self._training.update_masters()

    def _goes_on(self, path: Path) -> bool:
        """Whether training goes on while a checkpoint is written. Not if this process may end as soon as there is one."""
        assert self.lightning_module is not None
        state = self.lightning_module.trainer.state
        is_for_requeueing = path.name.startswith("hpc_ckpt")
        return (
            self._async_save and state.status == TrainerStatus.RUNNING and self._is_fitting() and not is_for_requeueing
        )

    def _saver_now(self) -> Saver:
        group = self.mesh.host_group()
        if self._saver is None or self._saver.group is not group:
            self._saver = Saver(group)
        return self._saver

    def _names(self) -> Names:
        # Made anew each time: moving a module to another device replaces its buffers.
        assert self.lightning_module is not None
        return Names(self.lightning_module, self._layouts)

    def _refusal(self, path: _PATH, local: Path | None, storage_options: Any | None) -> UnsupportedError:
        if local is None:
            return UnsupportedError(
                f"'{path}' is no path of a local or shared file system, to which `save_distributed_checkpoint=True` writes. Choose "
                "another one, or set `save_distributed_checkpoint=False`."
            )
        return UnsupportedError(
            "`TEDStrategy(save_distributed_checkpoint=True)` writes directories by itself, and can follow neither "
            f"`storage_options={storage_options!r}` nor `{type(self.checkpoint_io).__name__}`. Leave them out, or set "
            "`save_distributed_checkpoint=False`."
        )

    def _contents(self, checkpoint: dict[str, Any]) -> Contents:
        names, group = self._names(), self.mesh.host_group()
        collector = Collector(names, self.mesh)
        masters_of = self._training.find_master_ranges() if self._training is not None else lambda _: None
        model = collect_state_dict(checkpoint.get(STATE_DICT, {}), names, collector, masters_of)
        state = collect_rest(checkpoint, names, collector, masters_of)
        require_same(collector.described(), self.mesh, self.root_device)
        _tell_of_unnamed(names)
        state[STATE_DICT] = model
        if OPTIMIZER_STATES in checkpoint:
            state[OPTIMIZER_STATES] = [
                collect_state(index, optimizer, saved, names, collector, group)
                for index, (optimizer, saved) in enumerate(
                    zip(self.optimizers, checkpoint[OPTIMIZER_STATES], strict=True)
                )
            ]
        ranks = self._states_of_ranks(checkpoint)
        return Contents(collector.collect(), state, ranks, self._info(checkpoint))

    def _states_of_ranks(self, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        random = data.random_state(self.root_device) if self._set_aside is None else self._set_aside
        return going_on.states_of_ranks(checkpoint, random, self.topology, self.mesh.host_group())

    def _info(self, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """What the manifest tells of a checkpoint."""
        topology, module = self.topology, self.lightning_module
        assert module is not None
        return {
            "model": type(module).__name__,
            "global_step": checkpoint.get("global_step"),
            "epoch": checkpoint.get("epoch"),
            "time": time.time(),
            "layout": {
                "world_size": topology.world_size,
                "tensor": topology.tensor,
                "expert": topology.expert,
                "expert_tensor": topology.expert_tensor,
                "order": topology.order,
                "zero_stage": self._training_options.zero_stage,
            },
            "precision": self.precision_plugin.precision,
            "optimizers": [type(optimizer).__name__ for optimizer in self.optimizers]
            if OPTIMIZER_STATES in checkpoint
            else [],
            "versions": {"torch": str(torch.__version__), "lightning": lightning.__version__},
            HUGGINGFACE: described_models(module),
            stacked.INFO: stacked_experts(module),
        }

    def _save_file(
        self, checkpoint: dict[str, Any], path: _PATH, local: Path | None, storage_options: Any | None
    ) -> None:
        group = self.mesh.host_group()
        plain = local if type(self.checkpoint_io) is TorchCheckpointIO and storage_options is None else None
        folder = plain.parent if plain is not None else None
        if "loops" in checkpoint:
            ranks = self._states_of_ranks(checkpoint)
            checkpoint[OWN] = {**ranks, "info": self._info(checkpoint), "optimizers": self._numbering(checkpoint)}
        masters = {"master_of": self._training.find_masters()} if self._training is not None else {}
        file = SingleFile(names := self._names(), self.mesh, self.root_device, folder)
        write = partial(super().save_checkpoint, storage_options=storage_options)
        try:
            if folder is not None:
                by_first(lambda: folder.mkdir(parents=True, exist_ok=True), group)
            full = file.joined(checkpoint, self.optimizers, self.is_global_zero, **masters)
            _tell_of_unnamed(names)
            if self.is_global_zero and self.lightning_module is not None:
                full[STATE_DICT] = stacked.with_single(stacked_experts(self.lightning_module), full[STATE_DICT])
            by_first(lambda: write(full, path) if plain is None else _write_file(full, plain), group)
        except CheckpointError as error:
            raise CheckpointError(f"'{path}' could not be written ({error}); nothing has been changed.") from error

    def _numbering(self, checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The classes of the optimizers, and the names of the parameters that a file's states know by number."""
        names = self._names()
        return [
            {
                "class": type(optimizer).__name__,
                "parameters": [names.known(p)[0] for group in optimizer.param_groups for p in group["params"]]
                if isinstance(optimizer, ShardedOptimizer)
                else None,
            }
            for optimizer in (self.optimizers if OPTIMIZER_STATES in checkpoint else ())
        ]

    @override
    def remove_checkpoint(self, filepath: _PATH) -> None:
        path = _compat.local_path(filepath)
        if path is None or type(self.checkpoint_io) is not TorchCheckpointIO:
            super().remove_checkpoint(filepath)
        elif self.is_global_zero:
            # Without asking for a saver: to make one is a collective, and this is called on one rank.
            remove = directory.remove if self._saver is None else self._saver.remove
            try:
                remove(path)
            except OSError as error:  # raised on one rank, it would leave the others waiting
                rank_zero_warn(f"'{path}' could not be removed ({error}).")

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        self._set_aside = None  # of an evaluation that an exception has ended

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        if self._saver is not None:
            self._saver.finish()

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        # The process, or its peers, may be ended as soon as this returns.
        if self._saver is not None:
            self._saver.settle()

    # -- evaluations between steps -------------------------------------------------------------------------------------

    def _lend_generator(self, dataloader: object) -> None:
        generator = data.with_own_generator(dataloader, self.data_parallel_rank)
        if generator is not None:
            self._lent.add(generator)

    @override
    def on_validation_start(self) -> None:
        super().on_validation_start()
        if self._is_fitting():
            # Else a run that goes on behind the evaluation, which Lightning does not repeat, would draw other numbers.
            self._set_aside = data.random_state(self.root_device)

    @override
    def on_validation_end(self) -> None:
        super().on_validation_end()
        for generator in self._lent:
            # Every evaluation draws the same numbers, so also the first one of a run that goes on.
            generator.manual_seed(generator.initial_seed())
        if self._set_aside is not None:
            data.restore_random_state(self._set_aside, self.root_device)
            self._set_aside = None

    def _is_fitting(self) -> bool:
        assert self.lightning_module is not None
        return self.lightning_module.trainer.state.fn == TrainerFn.FITTING


def _tell_of_unnamed(names: Names) -> None:
    if names.unnamed:
        rank_zero_warn(
            f"The checkpoint's '{names.unnamed[0]}' has the shape of this rank's part of a parameter, and no name that tells of "
            "which: it is written as it is on one rank, and what others have there is lost. Keep it under the parameter's name, or "
            "all of them in the order of `parameters()`."
        )


def _write_file(checkpoint: Mapping[str, Any], path: Path) -> None:
    write_file(checkpoint, path)
    tell_of_objects(path, path)
