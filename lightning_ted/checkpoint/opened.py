"""A checkpoint of any form in one process, without the model: plain data at once, tensors when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import lightning
import torch
from torch import Tensor

from lightning_ted.checkpoint import directory, shards, stacked
from lightning_ted.checkpoint.boxes import Box
from lightning_ted.checkpoint.contents import (
    EXTRA,
    MODEL,
    OPTIMIZER_STATES,
    OWN,
    RANKS,
    STATE,
    STATE_DICT,
    TRAINING,
    Collector,
    Ranges,
    collect_rest,
    collect_state_dict,
    require_checkpoint,
    stand_ins,
)
from lightning_ted.checkpoint.directory import Manifest
from lightning_ted.checkpoint.files import check_file, read_file
from lightning_ted.checkpoint.numbering import by_name, numbers_of, own_names
from lightning_ted.checkpoint.portions import Portion
from lightning_ted.checkpoint.reader import Tensors
from lightning_ted.checkpoint.tree import Names
from lightning_ted.errors import CheckpointError
from lightning_ted.layout import ParamLayout

Form = Literal["directory", "file", "safetensors"]

#: What a checkpoint of weights alone lacks. The last one is the state of a gradient scaler.
_OF_TRAINING = (OPTIMIZER_STATES, "lr_schedulers", "callbacks", "MixedPrecision")


class Part(Protocol):
    """Some of the tensors of a checkpoint.

    Attributes:
        shapes: Of each tensor, by name.
        dtypes: The same.

    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def fill(self, targets: Mapping[str, Tensor]) -> None:
        """Read tensors, by name, into others of their shapes and perhaps of other dtypes."""

    def held(self, name: str) -> Tensor | None:
        """A tensor whose memory the file is; None if it has to be read."""

    def boxes(self, name: str) -> list[Box]:
        """Of which boxes in files a tensor is made up."""


class FiledPart:
    """Tensors of a checkpoint directory."""

    def __init__(self, folder: Path) -> None:
        self._tensors = Tensors(folder)
        self.shapes = self._tensors.shapes
        self.dtypes = self._tensors.dtypes

    def fill(self, targets: Mapping[str, Tensor]) -> None:
        self._tensors.read({name: Portion.whole(target) for name, target in targets.items()})

    def held(self, name: str) -> Tensor | None:
        return None

    def boxes(self, name: str) -> list[Box]:
        return self._tensors.boxes(name)


class MappedPart:
    """Tensors that lie in files as they lie in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}

    def fill(self, targets: Mapping[str, Tensor]) -> None:
        for name, target in targets.items():
            target.copy_(self._tensors[name])

    def held(self, name: str) -> Tensor | None:
        tensor = self._tensors[name]
        # Of a part of a storage, a file would hold all of it, or a copy would be made.
        return tensor if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes else None

    def boxes(self, name: str) -> list[Box]:
        return [Box.whole(self.shapes[name])]


@dataclass
class Opened:
    """What a checkpoint holds.

    Attributes:
        form: How it is stored.
        parts: Its tensors, by the folder that they have in a directory.
        state: Plain data, as in a directory. Optimizers whose parameters' names are not known have their states by number.
        ranks: Plain data of each rank; empty if none is kept.
        info: What a directory's manifest tells.

    """

    form: Form
    parts: dict[str, Part]
    state: dict[str, Any]
    ranks: Mapping[str, Any] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)

    def without_training(self) -> Opened:
        """The weights, and what else a checkpoint of weights alone holds."""
        state = {key: value for key, value in self.state.items() if key not in _OF_TRAINING}
        parts = {name: part for name, part in self.parts.items() if name != TRAINING}
        return Opened(self.form, parts, state, {}, {**self.info, "optimizers": []})

    def names(self, part: str) -> list[str]:
        """The tensors of a part that there is a use for."""
        if part not in self.parts:
            return []
        wanted = set(stand_ins(self.state)) if part == EXTRA else None
        return [name for name in self.parts[part].shapes if wanted is None or name in wanted]

    def unnamed_optimizers(self) -> list[int]:
        """Which optimizers' states are by number."""
        states = self.state.get(OPTIMIZER_STATES, [])
        return [index for index, saved in enumerate(states) if "class" not in saved and numbers_of(saved)]


# -- finding out what it is --------------------------------------------------------------------------------------------------


def form_of(path: Path) -> Form:
    """The form of a checkpoint.

    Raises:
        CheckpointError: If there is none.

    """
    if not path.exists():
        raise CheckpointError(f"There is no checkpoint '{path}'.")
    if path.is_dir():
        has_manifest = (path / directory.MANIFEST).exists()
        return "safetensors" if not has_manifest and any(path.glob(f"*{shards.SUFFIX}*")) else "directory"
    return "safetensors" if path.suffix == shards.SUFFIX else "file"


@dataclass(frozen=True)
class Check:
    """One file of a checkpoint that can be checked.

    Attributes:
        path: The file.
        size: Its length in bytes.
        run: Raises a :class:`CheckpointError` if it is damaged.

    """

    path: Path
    size: int
    run: Callable[[], Any]


def checks_of(path: Path, training: bool = True) -> list[Check]:
    """What tells whether a checkpoint is whole. Safetensors carry no checksums: their headers and lengths are looked at.

    Args:
        path: The checkpoint.
        training: Whether the optimizers' states are looked at, too, where they have files of their own.

    Raises:
        CheckpointError: If it is not even clear what it consists of.

    """
    form = form_of(path)
    if form == "directory":
        manifest = Manifest.read(path)
        return [
            Check(path / name, size, partial(manifest.check, path, [name]))
            for name, (size, _) in manifest.files.items()
            if training or not name.startswith(f"{TRAINING}/")
        ]
    if form == "safetensors":
        return [Check(file, _size(file), partial(shards.read_shard, file)) for file in shards.files_of(path)]
    return [Check(path, _size(path), partial(check_file, path))]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read ({error.strerror}).") from error


# -- opening it --------------------------------------------------------------------------------------------------------------


def open_checkpoint(path: Path) -> Opened:
    """Read the plain data of a checkpoint. Nothing is unpickled that could execute code.

    Raises:
        CheckpointError: If it is incomplete, damaged or something else, or holds more than tensors and plain data.

    """
    form = form_of(path)
    if form == "directory":
        return _open_directory(path)
    if form == "safetensors":
        return _open_safetensors(path)
    return _open_file(path)


def _open_safetensors(path: Path) -> Opened:
    tensors, aliases, info = shards.read_shards(path)
    state = {
        "epoch": info.get("epoch") or 0,
        "global_step": info.get("global_step") or 0,
        "pytorch-lightning_version": lightning.__version__,
        STATE_DICT: {"order": [*tensors, *aliases], "aliases": aliases, "others": {}, "versions": None},
    }
    return Opened("safetensors", {MODEL: MappedPart(tensors)}, state, {}, info)


def _open_directory(folder: Path) -> Opened:
    manifest = Manifest.read(folder)
    manifest.check(folder, contents=False)
    parts: dict[str, Part] = {
        name: FiledPart(folder / name) for name in (MODEL, EXTRA, TRAINING) if f"{name}/.metadata" in manifest.files
    }
    return Opened("directory", parts, read_file(folder / STATE, True), read_file(folder / RANKS, True), manifest.info)


def _open_file(path: Path) -> Opened:
    checkpoint = require_checkpoint(path, read_file(path, True))
    own = checkpoint.pop(OWN, {})
    told = (own.get("info") or {}).get(stacked.INFO)
    weights = stacked.with_stacked(told, checkpoint[STATE_DICT]) if told else checkpoint[STATE_DICT]
    names = _WholeNames(weights)
    collector = _WholeCollector()
    described = collect_state_dict(weights, names, collector, lambda _: None)
    state = collect_rest(checkpoint, names, collector, lambda _: None)
    state[STATE_DICT] = described
    info = own.get("info") or {
        "global_step": checkpoint.get("global_step"),
        "epoch": checkpoint.get("epoch"),
        "versions": {"lightning": checkpoint.get("pytorch-lightning_version")},
    }
    if OPTIMIZER_STATES in checkpoint:
        noted, tensors = own.get("optimizers", ()), collector.tensors[TRAINING]
        state[OPTIMIZER_STATES] = _by_name(checkpoint[OPTIMIZER_STATES], noted, names.shapes, tensors)
    parts: dict[str, Part] = {part: MappedPart(tensors) for part, tensors in collector.tensors.items() if tensors}
    return Opened("file", parts, state, {key: own[key] for key in ("tensor", "ranks") if key in own}, info)


def _by_name(
    states: Iterable[dict[str, Any]],
    noted: Sequence[Mapping[str, Any]],
    shapes: Mapping[str, tuple[int, ...]],
    tensors: dict[str, Tensor],
) -> list[dict[str, Any]]:
    """Optimizers' states by the names of parameters; by number where they are not known.

    Args:
        states: Of each optimizer, by number.
        noted: Of each optimizer, its class and the names of its parameters, if they were written down.
        shapes: Of the model's tensors.
        tensors: Takes those that have an entry for each element of a parameter.

    """
    result = []
    for index, state in enumerate(states):
        own: Mapping[str, Any] = {"class": "Optimizer", "parameters": own_names(state, shapes)}
        if index < len(noted):
            own = noted[index]
        if own["parameters"] is None or len(own["parameters"]) != len(numbers_of(state)):
            result.append(state)
        else:
            result.append(by_name(index, own["class"], state, own["parameters"], shapes, tensors))
    return result


class _WholeNames(Names):
    """The names of a state dict, of which nothing is cut."""

    def __init__(self, state_dict: Mapping[str, Any]) -> None:
        self.shapes = {name: tuple(value.shape) for name, value in state_dict.items() if isinstance(value, Tensor)}
        self._by_name = {name: ParamLayout(name, shape) for name, shape in self.shapes.items()}
        self._orders = []
        self._cut_shapes = {}
        self.unnamed = []


class _WholeCollector(Collector):
    """Collects whole tensors."""

    def __init__(self) -> None:
        self.tensors: dict[str, dict[str, Tensor]] = {MODEL: {}, EXTRA: {}, TRAINING: {}}

    def add(
        self, folder: str, name: str, tensor: Tensor, layout: ParamLayout | None, masters: Ranges | None = None
    ) -> None:
        self.tensors[folder][name] = tensor.detach()
