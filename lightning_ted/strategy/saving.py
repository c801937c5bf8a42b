"""The part of the strategy that writes checkpoints: directories of parts, or one file of whole tensors."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ted.checkpoint.contents import (
    OPTIMIZER_STATES,
    OWN,
    STATE_DICT,
    Collector,
    Contents,
    collect_rest,
    collect_state_dict,
)
from lightning_ted.checkpoint.distributed import Saver, agreed
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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._saver: Saver | None = None
        #: The random states of training, while an evaluation draws from the generators.
        self._set_aside: dict[str, Any] | None = None

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        plain = getattr(optimizer, "_optimizer", optimizer)
        if self._save_distributed and isinstance(plain, ShardedOptimizer):
            return groups_of(plain)  # what belongs to elements goes from where it is to its files
        return super().optimizer_state(optimizer)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        """Write a checkpoint. A collective: every rank calls it.

        Raises:
            CheckpointError: On every rank, if it could not be written, or (``async_save``) the one before could not.

        """
        path = self.broadcast(filepath)
        self._saver_now().wait()
        if self._training is not None:
            self._training.wait_for_weights()
            self._training.update_masters()
        if self._save_distributed:
            self._refuse_elsewhere(path, storage_options)
            self._saver_now().save(self._contents(checkpoint), Path(path), self._async_save)
        else:
            self._save_file(checkpoint, path, storage_options)

    def _saver_now(self) -> Saver:
        group = self.mesh.host_group()
        if self._saver is None or self._saver.group is not group:
            self._saver = Saver(group)
        return self._saver

    def _names(self) -> Names:
        # Made anew each time: moving a module to another device replaces its buffers.
        assert self.lightning_module is not None
        return Names(self.lightning_module, self._layouts)

    def _refuse_elsewhere(self, path: _PATH, storage_options: Any | None) -> None:
        if storage_options is not None or type(self.checkpoint_io) is not TorchCheckpointIO:
            raise UnsupportedError(
                "`TEDStrategy(save_distributed_checkpoint=True)` writes directories by itself, and can follow neither "
                f"`storage_options={storage_options!r}` nor `{type(self.checkpoint_io).__name__}`. Leave them out, or set "
                "`save_distributed_checkpoint=False`."
            )
        if not _compat.is_local(get_filesystem(path)):
            raise UnsupportedError(
                f"'{path}' is no path of a local or shared file system, to which `save_distributed_checkpoint=True` writes. Choose "
                "another one, or set `save_distributed_checkpoint=False`."
            )

    def _contents(self, checkpoint: dict[str, Any]) -> Contents:
        names, group = self._names(), self.mesh.host_group()
        collector = Collector(names, self.mesh)
        masters_of = self._training.find_master_ranges() if self._training is not None else lambda _: None
        model = collect_state_dict(checkpoint.get(STATE_DICT, {}), names, collector, masters_of)
        state = collect_rest(checkpoint, names, collector, masters_of)
        require_same(collector.described(), self.mesh, self.root_device)
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
        topology = self.topology
        return {
            "model": type(self.lightning_module).__name__,
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
        }

    def _save_file(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None) -> None:
        group = self.mesh.host_group()
        is_plain = type(self.checkpoint_io) is TorchCheckpointIO and _compat.is_local(get_filesystem(path))
        folder = Path(path).absolute().parent if is_plain else None
        if "loops" in checkpoint:
            ranks = self._states_of_ranks(checkpoint)
            checkpoint[OWN] = {**ranks, "info": self._info(checkpoint), "optimizers": self._numbering(checkpoint)}
        masters = {"master_of": self._training.find_masters()} if self._training is not None else {}
        file = SingleFile(self._names(), self.mesh, self.root_device, folder)
        try:
            if folder is not None:
                agreed(lambda: folder.mkdir(parents=True, exist_ok=True) if self.is_global_zero else None, group)
            full = file.joined(checkpoint, self.optimizers, self.is_global_zero, **masters)
            if is_plain and storage_options is None:
                agreed(lambda: write_file(full, Path(path)) if self.is_global_zero else None, group)
            else:
                super().save_checkpoint(full, path, storage_options)
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
        if not _compat.is_local(get_filesystem(filepath)) or type(self.checkpoint_io) is not TorchCheckpointIO:
            super().remove_checkpoint(filepath)
        elif self.is_global_zero:
            self._saver_now().remove(Path(filepath))

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        self._saver_now().wait()

    # -- evaluations between steps -------------------------------------------------------------------------------------

    @override
    def on_validation_start(self) -> None:
        super().on_validation_start()
        if self._is_fitting():
            # Else a run that goes on behind the evaluation, which Lightning does not repeat, would draw other numbers.
            self._set_aside = data.random_state(self.root_device)

    @override
    def on_validation_end(self) -> None:
        super().on_validation_end()
        if self._set_aside is not None:
            data.restore_random_state(self._set_aside, self.root_device)
            self._set_aside = None

    def _is_fitting(self) -> bool:
        assert self.lightning_module is not None
        return self.lightning_module.trainer.state.fn == TrainerFn.FITTING
