"""Weights alone as safetensors, in the files and under the names that Hugging Face's libraries use.

Two names of one tensor are written once, and the others noted beside it, as ``safetensors.torch.save_model`` does.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_ted.errors import CheckpointError

SUFFIX = ".safetensors"
INDEX = f"model{SUFFIX}.index.json"

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}

#: Under which key a file notes what a directory has in its manifest.
_INFO = "lightning_ted"


def files_of(path: Path) -> list[Path]:
    """The files of a folder of safetensors, or one file.

    Raises:
        CheckpointError: If it is not clear which they are.

    """
    if not path.is_dir():
        return [path]
    if (path / INDEX).exists():
        return [path / name for name in sorted(set(_weight_map(path).values()))]
    found = sorted(path.glob(f"*{SUFFIX}"))
    if len(found) != 1:
        raise CheckpointError(f"'{path}' holds {len(found)} files of safetensors, and no {INDEX} that tells of them.")
    return found


def _weight_map(folder: Path) -> dict[str, str]:
    """The file of each tensor."""
    path = folder / INDEX
    try:
        found = json.loads(path.read_bytes())["weight_map"]
        if any(Path(name).name != name for name in found.values()):
            raise ValueError("it names files elsewhere")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"'{path}' is damaged or something else ({error}).") from error
    return found


def read_shard(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, read when they are looked at, and what is noted beside them.

    Raises:
        CheckpointError: If its header is damaged, or does not fit its length.

    """
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"'{file}' cannot be read as safetensors ({error}). It may be truncated, damaged or something else."
        ) from error


def read_shards(path: Path) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    """All tensors, read when they are looked at; further names of some of them; and what is known of the checkpoint.

    Raises:
        CheckpointError: If a file is damaged or lacks a tensor.

    """
    tensors: dict[str, Tensor] = {}
    noted: dict[str, str] = {}
    for file in files_of(path):
        found, metadata = read_shard(file)
        tensors.update(found)
        noted.update(metadata)
    if path.is_dir() and (path / INDEX).exists():
        missing = _weight_map(path).keys() - tensors.keys()
        if missing:
            raise CheckpointError(f"'{path / INDEX}' names '{min(missing)}', which its file does not hold.")
    try:
        info = dict(json.loads(noted.pop(_INFO, "{}")))
    except (ValueError, TypeError):
        info = {}  # another's
    aliases = {name: first for name, first in noted.items() if first in tensors and name not in tensors}
    return tensors, aliases, info


def bytes_of(size: str) -> int:
    """Bytes of a size such as 500MB, 5GB or 2GiB.

    Raises:
        CheckpointError: If it is no size.

    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?b)?", size.strip(), re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise CheckpointError(f"`max_shard_size={size}` is no size of a file; write it as 500MB, 5GB or 2GiB.")
    return int(float(found[1]) * _UNITS[(found[2] or "").lower()])


def plan_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Which tensors go into which file, in order.

    Args:
        sizes: Bytes of each tensor.
        limit: Bytes of each file; a larger tensor is alone in one.

    """
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size > limit:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def write_shards(
    folder: Path,
    shards: list[list[str]],
    tensors_of: Callable[[list[str]], dict[str, Tensor]],
    aliases: Mapping[str, str],
    info: Mapping[str, Any],
) -> None:
    """Write a folder of safetensors, to disk.

    Args:
        folder: Where.
        shards: The tensors of each file.
        tensors_of: Gives those of one file, each with memory of its own.
        aliases: Further names of tensors.
        info: What is known of the checkpoint.

    Raises:
        OSError: If they cannot be written.

    """
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, 1):
        name = name_of(number, len(shards))
        tensors = tensors_of(names)
        write_shard(folder / name, tensors, aliases, info)
        weight_map.update(dict.fromkeys(names, name))
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        write_index(folder, weight_map, total)


def name_of(number: int, count: int) -> str:
    """The name of the ``number``-th (from 1) of ``count`` files of a folder."""
    return f"model{SUFFIX}" if count == 1 else f"model-{number:05d}-of-{count:05d}{SUFFIX}"


def write_index(folder: Path, weight_map: Mapping[str, str], total: int) -> None:
    """Write, to disk, in which file each tensor of a folder is.

    Args:
        folder: The folder.
        weight_map: The file of each tensor.
        total: Bytes of all tensors.

    """
    index = {"metadata": {"total_size": total}, "weight_map": dict(weight_map)}
    with (folder / INDEX).open("w") as file:
        json.dump(index, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def write_shard(file: Path, tensors: dict[str, Tensor], aliases: Mapping[str, str], info: Mapping[str, Any]) -> None:
    """Write one file of safetensors, to disk.

    Raises:
        OSError: If it cannot be written.
        CheckpointError: If the format has no such dtype.

    """
    noted = {name: first for name, first in aliases.items() if first in tensors}
    file.touch()
    mode = file.stat().st_mode
    try:
        save_file(tensors, file, {**noted, "format": "pt", _INFO: json.dumps(info)})
    except SafetensorError as error:  # what the library makes of an error of the system
        raise OSError(str(error)) from error
    except KeyError as error:
        raise CheckpointError(
            f"Safetensors know no tensors of {error.args[0]}; write a directory or one file."
        ) from error
    file.chmod(mode)  # the library's is its owner's alone
    with file.open("rb") as written:
        os.fsync(written.fileno())
