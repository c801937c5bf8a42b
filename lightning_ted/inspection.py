"""The command that tells what a checkpoint holds, without the model: ``lightning-ted inspect``."""

from __future__ import annotations

import json as json_format
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from torch import Tensor

from lightning_ted.checkpoint import directory
from lightning_ted.checkpoint.contents import EXTRA, MODEL, OPTIMIZER_STATES, STATE_DICT, TRAINING
from lightning_ted.checkpoint.numbering import numbers_of
from lightning_ted.checkpoint.opened import Opened, checks_of, form_of, open_checkpoint
from lightning_ted.checkpoint.optimizer_state import prefix_of, tensor_name
from lightning_ted.errors import CheckpointError
from lightning_ted.progress import Bars, size_of

#: What the parts of a directory are called.
_TITLES = {MODEL: "weights", TRAINING: "optimizer states", EXTRA: "averages of callbacks", "state": "other state"}

#: Keys of a checkpoint that are told of by other means.
_TOLD = {
    STATE_DICT,
    OPTIMIZER_STATES,
    "callbacks",
    "lr_schedulers",
    "loops",
    "epoch",
    "global_step",
    "pytorch-lightning_version",
}

#: Columns of a table that goes into a file or a pipe.
_WIDTH = 160


def inspect(checkpoint: str, tensors: bool = False, verify: bool = False, json: bool = False) -> None:
    """Tell what a checkpoint holds: step, layout, sizes, optimizers, and whether it is whole.

    Args:
        checkpoint: A checkpoint: a directory, a ``.ckpt`` file, a ``.safetensors`` file or a folder of them.
        tensors: List every tensor: name, shape, dtype, bytes, and the number of boxes that it is stored in.
        verify: Compare all files with their checksums; the exit status is 1 if one is damaged.
        json: Print JSON.

    Raises:
        CheckpointError: If it is missing, damaged or something else, or holds more than tensors and plain data.

    """
    path = directory.restored(Path(checkpoint))
    form_of(path)
    damages = find_damages(path) if verify else []
    if damages:
        found: dict[str, Any] = {"path": str(path), "damages": damages}
    else:
        found = {"path": str(path), **describe(path, tensors), **({"damages": []} if verify else {})}
    if json:
        print(json_format.dumps(found, indent=1, default=str))
    elif not damages:
        _print(found)
    if damages:
        raise CheckpointError(" ".join(damages))


def find_damages(path: Path) -> list[str]:
    """What is wrong with the files of a checkpoint; safetensors carry no checksums, so only their headers and lengths tell.

    Raises:
        CheckpointError: If it is not even clear what it consists of.

    """
    checks, damages = checks_of(path), []
    with Bars() as bars, bars.step("comparing checksums", sum(check.size for check in checks)) as advance:
        for check in checks:
            try:
                check.run()
            except CheckpointError as error:
                damages.append(str(error))
            advance(check.size)
    return damages


# -- what there is to tell ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """A tensor of a checkpoint."""

    part: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: int = 1

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def describe(path: Path, tensors: bool = False) -> dict[str, Any]:
    """What a checkpoint holds, as plain data.

    Args:
        path: The checkpoint.
        tensors: Whether to list every tensor.

    Raises:
        CheckpointError: If it is incomplete, damaged or something else.

    """
    opened = open_checkpoint(path)
    entries = list(_entries(opened))
    state, info = opened.state, opened.info
    described = {
        "form": opened.form,
        **({"version": directory.VERSION} if opened.form == "directory" else {}),
        "bytes_on_disk": size_of(path),
        **{key: info.get(key) for key in ("model", "global_step", "epoch", "layout", "precision", "versions")},
        "time": None
        if info.get("time") is None
        else datetime.fromtimestamp(info["time"]).astimezone().isoformat(" ", "seconds"),
        "parts": _parts(entries),
        "further_names": len(state[STATE_DICT]["aliases"]),
        "optimizers": [
            _optimizer(index, saved, entries) for index, saved in enumerate(state.get(OPTIMIZER_STATES, ()))
        ],
        "schedulers": len(state.get("lr_schedulers", ())),
        "callbacks": [str(name) for name in state.get("callbacks", ())],
        "other_keys": sorted(str(key) for key in state.keys() - _TOLD),
        "random_states": sum("random" in rank for rank in opened.ranks.get("ranks", ())),
        "loader_states": sum(bool(rank.get("loaders")) for rank in opened.ranks.get("ranks", ())),
    }
    if tensors:
        described["tensors"] = [
            {
                "part": entry.part,
                "name": entry.name,
                "shape": list(entry.shape),
                "dtype": _name_of(entry.dtype),
                "bytes": entry.nbytes,
                "boxes": entry.boxes,
            }
            for entry in entries
        ]
    return described


def _entries(opened: Opened) -> Iterator[_Entry]:
    for folder, part in opened.parts.items():
        for name, shape in part.shapes.items():
            yield _Entry(folder, name, shape, part.dtypes[name], len(part.boxes(name)))
    for key, value in opened.state.items():
        if key == OPTIMIZER_STATES:
            for index, saved in enumerate(value):
                for parameter, states in saved.get("state", {}).items():
                    for path, tensor in _tensors_in(states, tensor_name(index, str(parameter), "").removesuffix("/")):
                        yield _Entry(TRAINING, path, tuple(tensor.shape), tensor.dtype)
        else:
            for path, tensor in _tensors_in(value, str(key)):
                yield _Entry("state", path, tuple(tensor.shape), tensor.dtype)


def _tensors_in(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors_in(item, f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _tensors_in(item, f"{path}/{index}")


def _parts(entries: list[_Entry]) -> list[dict[str, Any]]:
    """Tensors, elements and bytes, by part and dtype."""
    sums: dict[tuple[str, str], list[int]] = {}
    for entry in entries:
        found = sums.setdefault((entry.part, _name_of(entry.dtype)), [0, 0, 0])
        for place, value in enumerate((1, entry.numel, entry.nbytes)):
            found[place] += value
    return [
        {"part": part, "dtype": dtype, "tensors": tensors, "elements": elements, "bytes": size}
        for (part, dtype), (tensors, elements, size) in sums.items()
    ]


def _optimizer(index: int, saved: Mapping[str, Any], entries: list[_Entry]) -> dict[str, Any]:
    prefix = prefix_of(index)
    kept = {
        entry.name.rpartition("/")[2] for entry in entries if entry.part == TRAINING and entry.name.startswith(prefix)
    }
    return {
        "class": saved.get("class"),
        "parameters": len(numbers_of(saved)),
        "states": sorted(kept),
        "groups": [
            {
                "parameters": len(group["params"]),
                **{key: group[key] for key in group if key not in ("params", "param_names")},
            }
            for group in saved.get("param_groups", ())
        ],
    }


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- telling it --------------------------------------------------------------------------------------------------------------


def _print(found: Mapping[str, Any]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, _WIDTH))
    console.print(_summary(found))
    console.print(_table_of_parts(found["parts"]))
    for index, optimizer in enumerate(found["optimizers"]):
        kept = ", ".join(optimizer["states"]) or "nothing yet"
        kind = optimizer["class"] or "of unnamed parameters"
        console.print(f"optimizer {index}: {kind}, of each parameter: {kept}", highlight=False, soft_wrap=True)
        console.print(_table_of_groups(optimizer))
    if "tensors" in found:
        console.print(_table_of_tensors(found["tensors"]))


def _summary(found: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    rows = {
        "checkpoint": found["path"],
        "form": {"directory": f"directory, version {found.get('version')}", "file": "one file"}.get(
            found["form"], found["form"]
        ),
        "on disk": decimal(found["bytes_on_disk"]),
        "checksums": None
        if "damages" not in found
        else "none to compare"
        if found["form"] == "safetensors"
        else "right",
        "model": found["model"],
        "step": found["global_step"],
        "epoch": found["epoch"],
        "written": found["time"],
        "layout": _pairs(found["layout"]),
        "precision": found["precision"],
        "versions": _pairs(found["versions"]),
        "schedulers": found["schedulers"] or None,
        "callbacks": ", ".join(found["callbacks"]),
        "other keys": ", ".join(found["other_keys"]),
        "tied weights": _counted(found["further_names"], "further name"),
        "random states": _counted(found["random_states"], "rank"),
        "loaders' states": _counted(found["loader_states"], "rank"),
    }
    for title, value in rows.items():
        if value not in (None, ""):
            table.add_row(title, str(value), style=None)
    return table


def _counted(number: int, what: str) -> str | None:
    return f"{number} {what}{'s' if number > 1 else ''}" if number else None


def _pairs(values: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{key}={value}" for key, value in (values or {}).items() if value is not None)


def _table_of_parts(parts: list[dict[str, Any]]) -> Table:
    table = Table("part", "dtype")
    for title in ("tensors", "elements", "bytes"):
        table.add_column(title, justify="right")
    for part in parts:
        title = _TITLES.get(part["part"], part["part"])
        table.add_row(title, part["dtype"], f"{part['tensors']:,}", f"{part['elements']:,}", decimal(part["bytes"]))
    return table


def _table_of_groups(optimizer: Mapping[str, Any]) -> Table:
    table = Table()
    table.add_column("group", justify="right")
    table.add_column("parameters", justify="right")
    table.add_column("settings", overflow="fold")
    for number, group in enumerate(optimizer["groups"]):
        settings = _pairs({key: value for key, value in group.items() if key != "parameters"})
        table.add_row(str(number), f"{group['parameters']:,}", settings)
    return table


def _table_of_tensors(tensors: list[dict[str, Any]]) -> Table:
    table = Table()
    table.add_column("tensor", overflow="fold")
    for title in ("shape", "dtype", "bytes", "boxes"):
        table.add_column(title, justify="right", no_wrap=True)
    for tensor in tensors:
        shape = " x ".join(map(str, tensor["shape"])) or "-"
        table.add_row(tensor["name"], shape, tensor["dtype"], f"{tensor['bytes']:,}", str(tensor["boxes"]))
    return table
