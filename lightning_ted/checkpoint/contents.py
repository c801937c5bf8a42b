"""What a checkpoint directory holds, from this rank's parts of it.

Tensors of the model go to ``model/``, under their qualified names; averages and the like that callbacks keep to ``extra/``; the
optimizers' states to ``training/``; everything else, plain data, to ``state.pt``; what differs between ranks to ``ranks.pt``.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_ted.checkpoint.portions import Portion, Portions, shared_out
from lightning_ted.checkpoint.scratch import pageable_or_pinned, starts_of
from lightning_ted.checkpoint.tree import Names
from lightning_ted.errors import CheckpointError
from lightning_ted.layout import ParamLayout
from lightning_ted.mesh import TEDMesh

MODEL, EXTRA, TRAINING, STATE, RANKS = "model", "extra", "training", "state.pt", "ranks.pt"
STATE_DICT, OPTIMIZER_STATES = "state_dict", "optimizer_states"

#: In a one-file checkpoint, under which key there is what a directory has in ``ranks.pt`` and its manifest.
OWN = "lightning_ted"

#: In plain data, what stands for the tensor of that name in ``extra/`` that lies as a parameter of that name does.
_STANDS_FOR, _PARAMETER = "lightning_ted.tensor", "parameter"

#: Gives the masters of a tensor that is a working weight, else None.
MastersOf = Callable[[Tensor], "Ranges | None"]


@dataclass(frozen=True)
class Ranges:
    """What this rank owns of its part of a parameter, or of what belongs to its elements.

    Attributes:
        parts: Where each range begins in the flat part, and its elements, flat.
        axis: The mesh axis on which the part is shared out.
        dtype: The same on all ranks, also on one that owns nothing.

    """

    parts: list[tuple[int, Tensor]]
    axis: str
    dtype: torch.dtype


@dataclass
class Contents:
    """What this rank is to write.

    Attributes:
        tensors: By folder and name.
        state: Plain data.
        ranks: Plain data of each rank.
        info: For the manifest.

    """

    tensors: dict[str, dict[str, Portion]] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    ranks: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)

    def files(self) -> dict[str, bytes]:
        """The files of plain data."""
        return {STATE: _pickled(self.state), RANKS: _pickled(self.ranks)}

    def stage(self, room: Tensor | None, plain: bool) -> tuple[Contents, Tensor]:
        """A copy in host memory, so that training may go on.

        Args:
            room: What the last call returned: bytes that nobody uses any more.
            plain: Whether this rank writes the plain data.

        Returns:
            The copy, and the bytes that its tensors are in.

        """
        found = [tensor for portion in self._portions() for tensor in portion.tensors]
        starts = starts_of(tensor.nbytes for tensor in found)
        on_cuda = any(tensor.is_cuda for tensor in found)
        if room is None or room.numel() < starts[-1]:
            room = None  # two would be too much
            room = pageable_or_pinned(starts[-1], on_cuda)
        copies = iter(
            room[start : start + tensor.nbytes]
            .view(tensor.dtype)
            .view(tensor.shape)
            .copy_(tensor.detach(), non_blocking=True)
            for start, tensor in zip(starts, found, strict=False)
        )
        tensors = {
            folder: {
                name: replace(portion, tensors=[next(copies) for _ in portion.tensors])
                for name, portion in portions.items()
            }
            for folder, portions in self.tensors.items()
        }
        if on_cuda:
            torch.cuda.synchronize()
        return _Staged(tensors, info=self.info, pickled=self.files() if plain else {}), room

    def _portions(self) -> Iterator[Portion]:
        for portions in self.tensors.values():
            yield from portions.values()


@dataclass
class _Staged(Contents):
    """Contents whose plain data are those of a moment that has passed."""

    pickled: dict[str, bytes] = field(default_factory=dict)

    @override
    def files(self) -> dict[str, bytes]:
        return self.pickled


def _pickled(data: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(data, stream)
    return stream.getvalue()


class Collector:
    """Collects what this rank is to write of tensors that several ranks hold: each is written once, about equally much by each.

    Args:
        names: How tensors lie.
        mesh: The mesh.

    """

    def __init__(self, names: Names, mesh: TEDMesh) -> None:
        self._names = names
        self._mesh = mesh
        self._portions = Portions(mesh)
        #: By the axes on which ranks hold different parts, and whether the parts of the others are equal.
        self._found: dict[tuple[frozenset[str], bool], dict[tuple[str, str], Portion]] = {}
        self._folders: set[str] = set()

    def expect(self, folder: str) -> None:
        """Have a folder even if this rank has nothing to write in it: every rank takes part in writing each."""
        self._folders.add(folder)

    def add(
        self, folder: str, name: str, tensor: Tensor, layout: ParamLayout | None, masters: Ranges | None = None
    ) -> None:
        """Add a tensor: this rank's part of it where there is a layout, else whole.

        What is no parameter, such as running statistics, may differ between data ranks: the first one's is written.
        """
        are_equal = self._names.is_parameter(name)
        if masters is not None and layout is not None:
            self.add_ranges(folder, name, masters, layout)
        elif layout is not None:
            self._put(
                folder, name, self._portions.of_part(tensor, layout), (cut.axis for cut in layout.cuts), are_equal
            )
        else:
            self._put(folder, name, Portion.whole(tensor.detach()), (), are_equal)

    def add_ranges(self, folder: str, name: str, ranges: Ranges, layout: ParamLayout) -> None:
        """Add ranges of this rank's part of a parameter."""
        portion = self._portions.of_ranges(ranges.parts, layout, ranges.dtype)
        self._put(folder, name, portion, (*(cut.axis for cut in layout.cuts), ranges.axis))

    def _put(self, folder: str, name: str, portion: Portion, axes: Iterable[str], are_equal: bool = True) -> None:
        self._found.setdefault((frozenset(axes), are_equal), {})[folder, name] = portion

    def collect(self) -> dict[str, dict[str, Portion]]:
        """What this rank is to write, by folder and name. The folders are the same on all ranks."""
        folders = self._folders | {folder for portions in self._found.values() for folder, _ in portions}
        result: dict[str, dict[str, Portion]] = {folder: {} for folder in sorted(folders)}
        for (axes, are_equal), portions in self._found.items():
            holders = self._holders(axes)
            sizes = {f"{folder}/{name}": portion.nbytes for (folder, name), portion in portions.items()}
            chosen = shared_out(sizes, holders if are_equal else holders[:1], self._mesh.rank)
            for (folder, name), portion in portions.items():
                if f"{folder}/{name}" in chosen:
                    result[folder][name] = portion
        return result

    def described(self) -> list[str]:
        """What has been added, the same on all ranks."""
        return [
            f"{folder}/{name} {portion.shape} {portion.dtype}"
            for portions in self._found.values()
            for (folder, name), portion in portions.items()
        ]

    def _holders(self, axes: Iterable[str]) -> list[int]:
        """The ranks that hold what this rank holds, where parts differ on ``axes``."""
        topology = self._mesh.topology

        def place(rank: int) -> list[int]:
            at = topology.coordinates(rank)
            return [rank if axis == "world" else getattr(at, axis) for axis in sorted(axes)]

        own = place(self._mesh.rank)
        return [rank for rank in range(topology.world_size) if place(rank) == own]


def collect_state_dict(
    state_dict: Mapping[str, Any], names: Names, collector: Collector, masters_of: MastersOf
) -> dict[str, Any]:
    """Collect the tensors of a model's state dict; returns what else there is to know of it.

    Two names of one tensor are written once.
    """
    first: dict[Any, str] = {}
    aliases: dict[str, str] = {}
    others: dict[str, Any] = {}
    for name, value in state_dict.items():
        if not isinstance(value, Tensor):
            others[name] = value
            continue
        memory = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else name
        if first.setdefault(memory, name) != name:
            aliases[name] = first[memory]
            continue
        layout = names.find(name)
        if layout is not None and tuple(value.shape) != layout.local_shape:
            layout = None
        collector.add(MODEL, name, value, layout, masters_of(value))
    versions = getattr(state_dict, "_metadata", None)
    return {
        "order": list(state_dict),
        "aliases": aliases,
        "others": others,
        "versions": None if versions is None else dict(versions),
    }


def restore_state_dict(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> OrderedDict[str, Any]:
    """A model's state dict, in order.

    Args:
        described: What :func:`collect_state_dict` returned.
        tensors: Those that it collected, or some of them; perhaps some further name of one apart from its first.

    """
    known = {**described["others"], **tensors}
    for name, first in described["aliases"].items():
        if first in tensors:
            known.setdefault(name, tensors[first])
    state_dict = OrderedDict((name, known[name]) for name in described["order"] if name in known)
    if described["versions"] is not None:
        state_dict._metadata = OrderedDict(described["versions"])  # type: ignore[attr-defined]
    return state_dict


def require_checkpoint(path: object, data: Any) -> dict[str, Any]:
    """``data``, if it is what a one-file checkpoint holds.

    Raises:
        CheckpointError: If it is something else.

    """
    weights = data.get(STATE_DICT) if isinstance(data, dict) else None
    if not isinstance(weights, dict):
        raise CheckpointError(f"'{path}' is no checkpoint of Lightning: it holds no `{STATE_DICT}`.")
    if {"order", "aliases", "others", "versions"} == set(weights):
        raise CheckpointError(f"'{path}' is a part of a checkpoint; name the directory around it.")
    own = data.get(OWN)
    if own is not None and not (isinstance(own, dict) and {"ranks", "tensor", "optimizers"} <= own.keys()):
        raise CheckpointError(
            f"'{path}' is damaged or something else: its entry '{OWN}' is not what this package writes."
        )
    return data


def collect_rest(
    checkpoint: Mapping[str, Any], names: Names, collector: Collector, masters_of: MastersOf
) -> dict[str, Any]:
    """The rest of a checkpoint as plain data; tensors of the shape of this rank's part of a parameter are collected.

    Raises:
        CheckpointError: If it already holds what stands for such a tensor.

    """
    taken: set[str] = set()

    def visit(path: str, tensor: Tensor, layout: ParamLayout) -> Any:
        if tuple(tensor.shape) != layout.local_shape:
            return tensor
        while path in taken:  # keys with dots in them can look like several keys
            path += "'"
        taken.add(path)
        collector.add(EXTRA, path, tensor, layout, masters_of(tensor))
        return {_STANDS_FOR: path, _PARAMETER: layout.name}

    rest = {key: value for key, value in checkpoint.items() if key not in (STATE_DICT, OPTIMIZER_STATES)}
    if (name := next(stand_ins(rest), None)) is not None:
        raise CheckpointError(
            f"A part of another checkpoint, with '{name}' in it, cannot be saved as plain data: leave it out."
        )
    return names.visit(rest, visit)


def restore_rest(state: Any, tensor_of: Callable[[str, str], Tensor]) -> Any:
    """Plain data with the tensors that were collected from it.

    Args:
        state: The plain data.
        tensor_of: Gives the tensor of a name in ``extra/`` that lies as a parameter of a second name does.

    """
    if isinstance(state, dict):
        if set(state) == {_STANDS_FOR, _PARAMETER}:
            return tensor_of(state[_STANDS_FOR], state[_PARAMETER])
        for key, value in state.items():
            state[key] = restore_rest(value, tensor_of)
    elif type(state) in (list, tuple):
        return type(state)(restore_rest(value, tensor_of) for value in state)
    return state


def stand_ins(state: Any) -> Iterator[str]:
    """The names of the tensors that were collected from plain data."""
    if isinstance(state, dict):
        if set(state) == {_STANDS_FOR, _PARAMETER}:
            yield state[_STANDS_FOR]
            return
        state = list(state.values())
    if type(state) in (list, tuple):
        for value in state:
            yield from stand_ins(value)
