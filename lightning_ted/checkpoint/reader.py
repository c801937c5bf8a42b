"""Reads tensors by boxes from files in torch's distributed checkpoint format.

What is read is only the rows that a box needs, not the whole chunk of a file that it lies in; and the pickled index is read by an
unpickler that knows nothing but the index's own classes.
"""

from __future__ import annotations

import mmap
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    Metadata,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.futures import Future
from typing_extensions import override

from lightning_ted.checkpoint.boxes import Box
from lightning_ted.checkpoint.portions import Portion
from lightning_ted.checkpoint.storage import INDEX, chunk_of, quiet, reason_of
from lightning_ted.errors import CheckpointError


class Tensors:
    """The tensors in one folder of files.

    Args:
        folder: The folder.

    Attributes:
        shapes: Of each tensor, by name.
        dtypes: The same.
        bytes_read: Bytes of tensors that this process has read.

    Raises:
        CheckpointError: If the index cannot be read.

    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self._index = _read_index(folder / INDEX)
        except Exception as error:  # damage makes an unpickler raise anything
            raise CheckpointError(
                f"'{folder / INDEX}' cannot be read as the index of a checkpoint ({error or type(error).__name__})."
            ) from error
        tensors = {
            name: entry
            for name, entry in self._index.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self.shapes = {name: tuple(entry.size) for name, entry in tensors.items()}
        self.dtypes = {name: entry.properties.dtype for name, entry in tensors.items()}
        self.bytes_read = 0

    def read(self, portions: Mapping[str, Portion], group: dist.ProcessGroup | None = None) -> None:
        """Fill the tensors of ``portions``, by name, from the files. A collective, unless ``group`` is None.

        Raises:
            CheckpointError: If a file cannot be read, or a tensor's shape is not that of its portion.

        """
        for name, portion in portions.items():
            if self.shapes.get(name) != tuple(portion.shape):
                raise CheckpointError(
                    f"'{name}' is of shape {list(portion.shape)} here, and of {self.shapes.get(name, 'none')} in '{self.folder}'."
                )
        reader = _Reader(self.folder, self._index)
        try:
            with quiet(group):
                dcp.load(
                    dict(portions),
                    storage_reader=reader,
                    planner=_LoadPlanner(),
                    process_group=group,
                    no_dist=group is None,
                )
        except CheckpointException as error:
            raise CheckpointError(reason_of(error)) from error
        self.bytes_read += reader.bytes_read

    def whole(self, name: str) -> Tensor:
        """One tensor, read by this process alone."""
        portion = Portion.whole(torch.empty(self.shapes[name], dtype=self.dtypes[name]))
        self.read({name: portion})
        return portion.tensors[0]

    def boxes(self, name: str) -> list[Box]:
        """Those that a tensor consists of in the files."""
        entry = self._index.state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata)
        return [Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(torch.Size(shape).numel() * self.dtypes[name].itemsize for name, shape in self.shapes.items())


class _LoadPlanner(DefaultLoadPlanner):
    @override
    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self._portions, self._metadata = state_dict, metadata

    @override
    def create_local_plan(self) -> LoadPlan:
        assert self._metadata is not None
        items: list[ReadItem] = []
        for name, portion in self._portions.items():
            boxes = [chunk_of(box) for box in portion.boxes if box.numel]
            entry = self._metadata.state_dict_metadata[name]
            assert isinstance(entry, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(name, entry, boxes)
        self._tensors = {
            (name, torch.Size(box.offsets)): tensor
            for name, portion in self._portions.items()
            for box, tensor in zip(portion.boxes, portion.tensors, strict=True)
        }
        return LoadPlan(items)

    @override
    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        index = read_item.dest_index
        assert index.offset is not None
        tensor = self._tensors[index.fqn, index.offset]
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            tensor = tensor.narrow(dim, offset, length)
        return tensor


class _Reader(FileSystemReader):
    """Reads of each chunk only what is asked for."""

    def __init__(self, folder: Path, index: Metadata) -> None:
        super().__init__(folder)
        self._index = index
        self._chunks = {
            (name, chunk.offsets): tuple(chunk.sizes)
            for name, entry in index.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
            for chunk in entry.chunks
        }
        self.bytes_read = 0

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._index

    @override
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in by_file.items():
            path = Path(self.path, name)
            try:
                # Not a private mapping: of a file that is larger than memory, the system might refuse one.
                with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
                    for item in items:
                        self._read_item(item, file, memory, planner)
            except (OSError, ValueError, RuntimeError) as error:
                raise CheckpointError(f"'{path}' cannot be read ({error}); it may be truncated or damaged.") from error
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_item(self, item: ReadItem, file: IO[bytes], memory: mmap.mmap, planner: LoadPlanner) -> None:
        index = item.storage_index
        info = self.storage_data[index]
        dtype = self._index.state_dict_metadata[index.fqn].properties.dtype  # type: ignore[union-attr]
        assert index.offset is not None
        sizes = self._chunks[index.fqn, index.offset]
        # Where the elements begin in the archive that `torch.save` makes of one tensor.
        at = info.offset + torch._C.PyTorchFileReader(self._slice_file(file, info)).get_record_offset("data/0")  # type: ignore[attr-defined]
        target = planner.resolve_tensor(item)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")  # nor is it written to
            chunk = torch.frombuffer(memory, dtype=dtype, count=torch.Size(sizes).numel(), offset=at).view(sizes)
        for dim, (offset, size) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            chunk = chunk.narrow(dim, offset, size)
        target.copy_(chunk)
        self.bytes_read += chunk.nbytes
        del chunk  # else the memory could not be closed


_METADATA = "torch.distributed.checkpoint.metadata"
_KNOWN = {
    *((_METADATA, name) for name in ("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata")),
    *((_METADATA, name) for name in ("MetadataIndex", "StorageMeta", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
}


class _IndexUnpickler(pickle.Unpickler):
    @override
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds a {module}.{name}, which no index holds")


def _read_index(path: Path) -> Metadata:
    with path.open("rb") as file:
        index = _IndexUnpickler(file).load()
    if not isinstance(index, Metadata) or index.storage_data is None:
        raise ValueError("it is something else")
    if any(Path(info.relative_path).name != info.relative_path for info in index.storage_data.values()):
        raise ValueError("it names files elsewhere")
    index.storage_meta = index.storage_meta or StorageMeta()
    return index
