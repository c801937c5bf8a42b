"""Room for tensors on disk, for those that host memory could not hold together."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)

_ALIGNMENT = 64


def room_for(wanted: Mapping[Key, tuple[tuple[int, ...], torch.dtype]], folder: Path) -> dict[Key, Tensor]:
    """Tensors in one nameless file, which host memory is free to hold or not. The file goes with the last of them.

    Args:
        wanted: Shape and dtype of each tensor.
        folder: On whose file system.

    Raises:
        OSError: If there is no room for all of them.

    """
    starts, end = {}, 0
    for key, (shape, dtype) in wanted.items():
        starts[key] = end
        end += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    if end == 0:
        return {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in wanted.items()}
    with tempfile.TemporaryFile(dir=folder) as file:
        # Not a file of holes: where a disk is full, writing into one would end the process.
        _allocate(file.fileno(), end)
        memory = mmap.mmap(file.fileno(), end)
    return {key: _view(memory, starts[key], shape, dtype) for key, (shape, dtype) in wanted.items()}


def _allocate(file: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.truncate(file, size)


def _view(memory: mmap.mmap, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    size = math.prod(shape) * dtype.itemsize
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=start).view(dtype).view(shape)
