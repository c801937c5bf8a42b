"""Room for tensors on disk, for those that host memory could not hold together."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Hashable, Iterable, Mapping
from itertools import accumulate
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
    *starts, end = starts_of(math.prod(shape) * dtype.itemsize for shape, dtype in wanted.values())
    if end == 0:
        return {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in wanted.items()}
    with tempfile.TemporaryFile(dir=folder) as file:
        # Not a file of holes: where a disk is full, writing into one would end the process.
        _allocate(file.fileno(), end)
        memory = mmap.mmap(file.fileno(), end)
    return {
        key: _view(memory, start, shape, dtype)
        for start, (key, (shape, dtype)) in zip(starts, wanted.items(), strict=True)
    }


def starts_of(sizes: Iterable[int]) -> list[int]:
    """Where tensors of so many bytes begin in one memory, and where the last one ends."""
    return [0, *accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)]


def pageable_or_pinned(size: int, pinned: bool) -> Tensor:
    """So many bytes of host memory; ``pinned``: from which a GPU copies without waiting.

    Registered, not allocated, as pinned: torch's allocator would round them up to a power of two, and keep them.
    """
    room = torch.empty(size, dtype=torch.uint8)
    if pinned and size:
        runtime, address = torch.cuda.cudart(), room.data_ptr()
        code = int(runtime.cudaHostRegister(address, size, 0))
        if code:
            raise MemoryError(f"{size} bytes of host memory could not be pinned for a checkpoint (CUDA error {code}).")
        weakref.finalize(room, runtime.cudaHostUnregister, address)
    return room


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
