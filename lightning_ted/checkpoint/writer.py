"""Writes tensors by boxes, in torch's distributed checkpoint format, so that its own tools read them."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import (
    DEFAULT_SUFFIX,
    FileSystem,
    FileSystemWriter,
    _StorageInfo,
)
from torch.distributed.checkpoint.metadata import (
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from typing_extensions import override

from lightning_ted.checkpoint.portions import Portion
from lightning_ted.checkpoint.storage import INDEX, chunk_of, quiet
from lightning_ted.checkpoint.stream import save_into

#: Length in bytes and CRC-32 of a file.
FileSum = tuple[int, int]


def write_portions(
    folder: Path, portions: Mapping[str, Portion], group: dist.ProcessGroup | None
) -> dict[str, FileSum]:
    """Write what all ranks of ``group`` hold into the files of one folder. A collective, unless ``group`` is None.

    Args:
        folder: Where; the same on all ranks.
        portions: What this rank is to write, by name. Together, the ranks' boxes make up each whole tensor exactly once.
        group: Who writes; None for this process alone.

    Returns:
        Of each file that this rank has written, its length and checksum.

    Raises:
        Exception: On every rank, if one of them fails.

    """
    files = _SummingFiles()
    writer = _Writer(folder, sync_files=True, overwrite=False)
    writer.fs = files
    with quiet(group):
        dcp.save(
            dict(portions), storage_writer=writer, planner=_SavePlanner(), process_group=group, no_dist=group is None
        )
    return {INDEX if name.startswith(INDEX) else name: (file.size, file.crc) for name, file in files.written.items()}


class _SavePlanner(DefaultSavePlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    @override
    def create_local_plan(self) -> SavePlan:
        self._tensors: dict[MetadataIndex, Tensor] = {}
        items = []
        for name, portion in self.state_dict.items():
            properties = TensorProperties(dtype=portion.dtype)
            for box, tensor in zip(portion.boxes, portion.tensors, strict=True):
                index = MetadataIndex(name, torch.Size(box.offsets))
                data = TensorWriteData(chunk_of(box), properties, torch.Size(portion.shape))
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
                self._tensors[index] = tensor
        self.plan = SavePlan(items)
        return self.plan

    @override
    def resolve_data(self, write_item: WriteItem) -> Tensor:
        tensor = self._tensors[write_item.index].cpu().contiguous()
        # Of a view, `torch.save` writes what it is a view of.
        return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


class _Writer(FileSystemWriter):
    """Holds one tensor at a time."""

    @override
    def storage_meta(self) -> StorageMeta | None:
        return None  # else the index would hold the path, and with it a class of path

    @override
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        if plan.items:
            with self.fs.create_stream(Path(self.path, name), "wb") as stream:
                for item in plan.items:
                    begin = stream.tell()
                    save_into(stream, planner.resolve_data(item))  # type: ignore[arg-type]
                    length = stream.tell() - begin
                    results.append(WriteResult(item.index, length, _StorageInfo(name, begin, length)))
                os.fsync(stream.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


class _SummingFiles(FileSystem):
    """Knows what has been written into each file."""

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[str, _SummedFile] = {}

    @override
    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        with Path(path).open(mode) as stream:
            file = self.written[Path(path).name] = _SummedFile(stream)
            yield file


class _SummedFile:
    """A file that is written from its beginning to its end."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.size = 0
        self.crc = 0

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self._stream.write(view)
        self.crc = zlib.crc32(view, self.crc)
        self.size += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        # For `os.fsync`, which knows nothing of what is still held back here.
        self._stream.flush()
        return self._stream.fileno()

    def close(self) -> None:
        self._stream.close()
