"""Files that torch writes: whether they are whole, and what they hold, without executing any of it."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lightning_ted.errors import CheckpointError

#: The last record of an archive, and its length without a comment.
_END, _END_LENGTH = b"PK\x05\x06", 22


@contextmanager
def reading(path: object) -> Iterator[None]:
    """Name the file where reading it fails.

    Raises:
        CheckpointError: If the file is empty, truncated or no checkpoint.

    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # of what is damaged or something else, the library raises anything
        told = f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else "it is empty"
        raise CheckpointError(
            f"'{path}' cannot be read as a checkpoint ({told}). It may be truncated, damaged or something else; use an older one."
        ) from error


def is_archive(path: Path) -> bool:
    """Whether a file is one of those that torch writes today."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # it looks like one, and is damaged
        return False


def objects_in(file: Path | io.BytesIO) -> list[str]:
    """What a file holds besides tensors and plain data; nothing, if that cannot be told."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except (RuntimeError, ValueError, EOFError, OSError, pickle.UnpicklingError):
        return []  # reading it will tell


def read_file(path: Path, weights_only: bool | None) -> Any:
    """What a file holds; tensors of an archive are read when they are looked at.

    Args:
        path: The file.
        weights_only: False to allow what can execute code when it is read.

    Raises:
        CheckpointError: If it is something else, or holds more than tensors and plain data.

    """
    archive, strict = is_archive(path), weights_only is not False
    found = objects_in(path) if strict and archive else []
    if found:
        raise CheckpointError(
            f"'{path}' holds more than tensors and plain data: {', '.join(found)}. To read that could execute code, so it is not "
            "done. It is in the hyper-parameters, or in what a callback, scheduler or hook has put into the checkpoint: save it "
            "as plain data; or, if you trust the file, pass `weights_only=False` to the Trainer's method."
        )
    with reading(path):
        return torch.load(path, map_location="cpu", weights_only=strict, mmap=archive or None)


def check_file(path: Path, weights_only: bool | None = True) -> None:
    """Compare the contents of a checkpoint with the checksums that it holds.

    Args:
        path: The file.
        weights_only: As in :func:`read_file`.

    Raises:
        CheckpointError: If it is truncated, damaged or something else.

    """
    if not is_archive(path):
        # One of an old version of torch, which holds no checksums; or an archive that has lost its end.
        read_file(path, weights_only)
        return
    with reading(path), zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise CheckpointError(f"'{path}' is damaged: the checksum of '{damaged}' is wrong. Use an older checkpoint.")
    with path.open("rb") as file:
        file.seek(-_END_LENGTH, os.SEEK_END)
        if not file.read().startswith(_END):
            raise CheckpointError(f"'{path}' is damaged: it goes on behind its end. Use an older checkpoint.")
