"""The part of the strategy that reads checkpoints, of any layout: of each, what this rank needs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ted.adapters import stacked_experts
from lightning_ted.checkpoint import directory
from lightning_ted.checkpoint.contents import (
    OPTIMIZER_STATES,
    OWN,
    STATE_DICT,
    require_checkpoint,
    restore_rest,
    restore_state_dict,
)
from lightning_ted.checkpoint.distributed import Source, agreed, by_first
from lightning_ted.checkpoint.files import check_file, read_file, reading
from lightning_ted.checkpoint.numbering import numbers_of, own_names, renumbered
from lightning_ted.checkpoint.optimizer_state import restore_state
from lightning_ted.checkpoint.portions import Portion, Portions
from lightning_ted.checkpoint.reader import Tensors
from lightning_ted.checkpoint.single_file import SingleFile
from lightning_ted.checkpoint.stacked import with_stacked
from lightning_ted.checkpoint.tree import Names
from lightning_ted.errors import CheckpointError
from lightning_ted.layout import ParamLayout
from lightning_ted.optim.sharded import ShardedOptimizer
from lightning_ted.strategy import _compat, going_on
from lightning_ted.strategy._compat import is_overridden
from lightning_ted.strategy.saving import SavingStrategy


@dataclass(frozen=True)
class Stored:
    """Where to read an optimizer's state in a directory, once the optimizer is there.

    Attributes:
        saved: What is known by name.
        tensors: Those of all optimizers that have an entry for each element of a parameter.

    """

    saved: Mapping[str, Any]
    tensors: Tensors | None


class LoadingStrategy(SavingStrategy):
    """A strategy that writes and reads checkpoints."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._going_on: going_on.GoingOn | None = None
        self._wants_last = False
        #: Whole tensors of other shapes than the model's, as they were read: one may look like this rank's part.
        self._misfits: dict[str, Any] = {}
        #: The classes of the optimizers of a file, and the names of the parameters that it knows by number.
        self._numbering_then: Sequence[Mapping[str, Any]] = []

    @override
    def _before_launch(self, module: pl.LightningModule | None, arguments: Sequence[Any]) -> None:
        super()._before_launch(module, arguments)
        # Lightning makes a path of it before anybody is asked to read that.
        self._wants_last = any(isinstance(argument, str) and argument == "last" for argument in arguments)
        for trainer in arguments if self._wants_last else ():
            for folder in _compat.checkpoint_folders(trainer) if isinstance(trainer, pl.Trainer) else ():
                directory.recover(folder)

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """This rank's parts of a checkpoint, a directory or a file. A collective: every rank calls it.

        Raises:
            CheckpointError: On every rank, if it is missing, incomplete, damaged or something else.

        """
        self._saver_now().wait()
        path = self.broadcast(checkpoint_path)
        local, group = _compat.local_path(path), self.mesh.host_group()
        if local is None or type(self.checkpoint_io) is not TorchCheckpointIO:
            return self._cut(agreed(lambda: _require_lightnings(path, self._read_elsewhere(path, weights_only)), group))
        opened = (self._open_newest if self._wants_last else self._open)(local, weights_only)
        if isinstance(opened, Source):
            return self._load_directory(opened)
        return self._cut(opened)

    def _read_elsewhere(self, path: _PATH, weights_only: bool | None) -> dict[str, Any]:
        with reading(path):
            return super().load_checkpoint(path, weights_only)

    def _open_newest(self, path: Path, weights_only: bool | None) -> Source | dict[str, Any]:
        """``path``, or the newest whole checkpoint beside it if it is not whole."""
        found = [path, *(other for other in directory.checkpoints_in(path.parent) if other != path)]
        reasons = []
        for candidate in self.broadcast(found):
            try:
                opened = self._open(candidate, weights_only)
            except CheckpointError as error:
                reasons.append(str(error))
                continue
            for reason in reasons:
                rank_zero_warn(f"`ckpt_path=\"last\"` passes over a checkpoint: {reason} Going on from '{candidate}'.")
            return opened
        raise CheckpointError('`ckpt_path="last"` finds no whole checkpoint: ' + " ".join(reasons))

    def _open(self, path: Path, weights_only: bool | None) -> Source | dict[str, Any]:
        """A directory, or what a file holds, that is whole. A collective."""
        group = self.mesh.host_group()
        agreed(lambda: _require_existence(path), group)
        if directory.restored(path).is_dir():
            return Source(path, group, self._is_fitting(), weights_only is not False)
        by_first(lambda: check_file(path, weights_only), group)
        return agreed(lambda: _require_lightnings(path, read_file(path, weights_only)), group)

    def _cut(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        own = checkpoint.pop(OWN, None)
        self._note_where_to_go_on(checkpoint, own)
        self._numbering_then = own["optimizers"] if own else []
        assert self.lightning_module is not None
        checkpoint[STATE_DICT] = with_stacked(stacked_experts(self.lightning_module), checkpoint.get(STATE_DICT, {}))
        names, state_dict = self._names(), checkpoint[STATE_DICT]
        self._misfits = {name: value for name, value in state_dict.items() if not _fits(value, names.exactly(name))}
        return self._single_file().cut(checkpoint)

    def _single_file(self) -> SingleFile:
        return SingleFile(self._names(), self.mesh, self.root_device)

    def _note_where_to_go_on(self, checkpoint: Mapping[str, Any], saved: Mapping[str, Any] | None) -> None:
        self._going_on = going_on.GoingOn(saved, self.topology, self.global_rank, self.root_device)
        self._going_on.take_loaders(checkpoint)

    def _load_directory(self, source: Source) -> dict[str, Any]:
        checkpoint = dict(source.state)
        checkpoint[STATE_DICT] = self._read_state_dict(source, checkpoint[STATE_DICT])
        names, portions = self._names(), Portions(self.mesh)

        def tensor_of(name: str, parameter: str) -> Tensor:
            assert source.extra is not None
            layout = names.exactly(parameter)
            shape, dtype = source.extra.shapes[name], source.extra.dtypes[name]
            cut = layout is not None and shape == layout.global_shape
            tensor = torch.empty(layout.local_shape if cut and layout is not None else shape, dtype=dtype)
            wanted[name] = portions.of_part(tensor, layout) if cut and layout is not None else Portion.whole(tensor)
            return tensor

        wanted: dict[str, Portion] = {}
        stored = checkpoint.pop(OPTIMIZER_STATES, None)
        checkpoint = restore_rest(checkpoint, tensor_of)
        if source.extra is not None:
            source.extra.read(wanted, source.group)
        if stored is not None:
            checkpoint[OPTIMIZER_STATES] = [
                {"state": {}, "param_groups": saved["param_groups"], OWN: Stored(saved, source.training)}
                if "class" in saved
                else saved
                for saved in stored
            ]
        self._note_where_to_go_on(checkpoint, source.ranks if "loops" in checkpoint else None)
        return checkpoint

    def _read_state_dict(self, source: Source, described: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's parts of the model; whole tensors under names that the model has not got, if a hook may want them."""
        names, portions = self._names(), Portions(self.mesh)
        state_dict: dict[str, Tensor] = {}
        wanted: dict[str, Portion] = {}
        self._misfits = {}
        tensors = source.model
        for name in tensors.shapes if tensors is not None else ():
            assert tensors is not None
            layout, shape, dtype = names.find(name), tensors.shapes[name], tensors.dtypes[name]
            if layout is not None and shape == layout.global_shape:
                state_dict[name] = torch.empty(layout.local_shape, dtype=dtype)
                wanted[name] = portions.of_part(state_dict[name], layout)
            elif name in names or self._hooks_see_checkpoints():
                state_dict[name] = torch.empty(shape, dtype=dtype)
                wanted[name] = Portion.whole(state_dict[name])
                self._misfits[name] = state_dict[name]
            else:
                state_dict[name] = torch.empty(shape, dtype=dtype, device="meta")
        if tensors is not None:
            tensors.read(wanted, source.group)
            for alias, first in described["aliases"].items():
                layout = names.exactly(alias)
                if layout is None or layout == names.exactly(first) or tensors.shapes[first] != layout.global_shape:
                    continue
                # What was one tensor is two now, or has lost the name under which it was written.
                state_dict[alias] = torch.empty(layout.local_shape, dtype=tensors.dtypes[first])
                tensors.read({first: portions.of_part(state_dict[alias], layout)}, source.group)
        return restore_state_dict(described, state_dict)

    def _hooks_see_checkpoints(self) -> bool:
        module = self.lightning_module
        assert module is not None
        seen = is_overridden("on_load_checkpoint", module) or is_overridden("load_state_dict", module)
        return (
            seen
            or any(
                type(callback).on_load_checkpoint is not pl.Callback.on_load_checkpoint
                for callback in module.trainer.callbacks  # type: ignore[attr-defined]
            )
            or any(map(_renames, module.modules()))
        )

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        self._wait_for_weights()
        assert self.lightning_module is not None
        # Lightning would do so after this, and round the weights of a wider dtype to that in which the module was built.
        self.precision_plugin.convert_module(self.lightning_module)
        names, file = self._names(), self._single_file()
        state_dict = checkpoint[STATE_DICT]
        for name, value in state_dict.items():
            layout = names.exactly(name)
            if layout is None or not isinstance(value, Tensor):
                continue
            state_dict[name] = part = file.part(value, layout)  # a hook may have put a whole one there
            if tuple(part.shape) != layout.local_shape or value is self._misfits.get(name):
                raise CheckpointError(
                    f"'{name}' is of shape {list(value.shape)} in the checkpoint, and of {list(layout.global_shape)} in "
                    f"{type(self.lightning_module).__name__}. Build the model that was saved, or take the tensor out of "
                    "`checkpoint['state_dict']` in `on_load_checkpoint`, with `strict_loading=False`."
                )
        frozen = self._frozen_parameters()
        missing = self.lightning_module.state_dict().keys() - state_dict.keys()
        if self._exclude_frozen:
            for name, value in frozen.items():
                state_dict.setdefault(name, value)
        try:
            super().load_model_state_dict(checkpoint, strict)
        except RuntimeError as error:
            if not missing or not missing <= frozen.keys():
                raise
            raise CheckpointError(
                f"The checkpoint lacks frozen parameters ('{min(missing)}', ...), as one that was written with "
                "`exclude_frozen_parameters=True` does. Set that to load it, too: the model keeps the ones that it was built with."
            ) from error
        if self._training is not None:
            # Not by way of the working weights, which are rounded.
            self._training.update_masters(state_dict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        names, portions, file = self._names(), Portions(self.mesh), self._single_file()
        states = checkpoint[OPTIMIZER_STATES]
        if len(states) != len(self.optimizers):
            raise CheckpointError(
                f"The checkpoint holds the states of {len(states)} optimizers, and `configure_optimizers` returns "
                f"{len(self.optimizers)}. "
                + (
                    "Return the same ones, or load the weights alone."
                    if states
                    else "It was not written while or after the model was trained: load its weights alone."
                )
            )
        for index, (optimizer, state) in enumerate(zip(self.optimizers, states, strict=True)):
            stored = state.get(OWN)
            if isinstance(stored, Stored):
                group = self.mesh.host_group()
                saved = {**stored.saved, "param_groups": state["param_groups"]}
                state = restore_state(index, optimizer, saved, stored.tensors, names, portions, group)
            elif any(isinstance(number, str) for number in numbers_of(state)):
                raise CheckpointError(
                    f"The state of optimizer {index} comes from a directory, and lacks the entry '{OWN}' that tells where the rest "
                    "is. A hook that makes another dictionary of it has to keep all entries: `{**state, ...}`."
                )
            else:
                state = file.cut_optimizer_state(self._renumbered(index, optimizer, state, names), optimizer)
            optimizer.load_state_dict(state)

    def _renumbered(self, index: int, optimizer: Optimizer, state: dict[str, Any], names: Names) -> dict[str, Any]:
        """A file's state by the numbers that parameters have now, if it is known which they were."""
        if not isinstance(optimizer, ShardedOptimizer) or "param_groups" not in state:
            return state
        kind, before = type(optimizer).__name__, own_names(state, names)
        if index < len(self._numbering_then):
            kind, before = self._numbering_then[index]["class"], self._numbering_then[index]["parameters"]
        if before is None or len(before) != len(numbers_of(state)):
            return state
        now = [names.known(parameter)[0] for group in optimizer.param_groups for parameter in group["params"]]
        return renumbered(kind, state, before, optimizer, now)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        if self._going_on is not None:
            assert self.lightning_module is not None
            self._going_on.restore_random_state(self.lightning_module.trainer)
            self._going_on = None


def _renames(module: nn.Module) -> bool:
    """Whether a module may look at entries of a state dict under names of its own."""
    own = type(module)._load_from_state_dict
    return bool(module._load_state_dict_pre_hooks) or not own.__module__.startswith("torch.")


def _fits(value: Any, layout: ParamLayout | None) -> bool:
    return layout is None or not isinstance(value, Tensor) or tuple(value.shape) == layout.global_shape


def _require_existence(path: Path) -> None:
    if not os.path.exists(directory.restored(path)):
        raise CheckpointError(f"There is no checkpoint '{path}'.")


def _require_lightnings(path: object, data: Any) -> dict[str, Any]:
    if "pytorch-lightning_version" not in require_checkpoint(path, data):
        raise CheckpointError(f"'{path}' is no checkpoint of Lightning: it does not tell which version has written it.")
    return data
