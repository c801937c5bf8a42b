"""What the writer and the reader of files in torch's distributed checkpoint format share."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from lightning_ted.checkpoint.boxes import Box

#: The file that tells where tensors are in the others.
INDEX = ".metadata"


def chunk_of(box: Box) -> ChunkStorageMetadata:
    """A box as the format knows it."""
    return ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))


def reason_of(error: BaseException) -> str:
    """Why reading or writing has failed, on the first rank where it has."""
    if isinstance(error, CheckpointException):
        # Of each rank, the error and where it was raised.
        error = next(iter(error.failures.values()))[0]
    return str(error).strip() or type(error).__name__


@contextmanager
def quiet(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Without the warning of one process alone."""
    if group is not None:  # perhaps in a thread, where filters are not one's own
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield
