"""Tensors of a checkpoint read onto disk, so that host memory need not hold them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_ted.checkpoint.contents import MODEL
from lightning_ted.checkpoint.opened import Opened
from lightning_ted.checkpoint.scratch import room_for
from lightning_ted.progress import Bars

#: Bytes of tensors that are read at a time.
_AT_ONCE = 2**26


@dataclass(frozen=True)
class Reader:
    """Reads tensors onto disk.

    Attributes:
        opened: What is read.
        dtype: Of floating-point weights; None leaves them.
        folder: On whose file system there is room.
        bars: Tell how far it is.

    """

    opened: Opened
    dtype: torch.dtype | None
    folder: Path
    bars: Bars

    def dtype_of(self, part: str, name: str) -> torch.dtype:
        """That a tensor is to have."""
        dtype = self.opened.parts[part].dtypes[name]
        return self.dtype if part == MODEL and self.dtype is not None and dtype.is_floating_point else dtype

    def sizes(self, part: str) -> dict[str, int]:
        """Bytes of each tensor of a part, as it will be."""
        shapes = self.opened.parts[part].shapes if part in self.opened.parts else {}
        return {
            name: torch.Size(shapes[name]).numel() * self.dtype_of(part, name).itemsize
            for name in self.opened.names(part)
        }

    def read(self, part: str, names: Iterable[str], anew: bool = False) -> dict[str, Tensor]:
        """Tensors whose memory is in files: those of the checkpoint, if they lie there as they are to be, or new ones.

        Args:
            part: Of which part.
            names: Which.
            anew: Whether each is to have memory of its own.

        """
        if part not in self.opened.parts:
            return {}
        source = self.opened.parts[part]
        held: dict[str, Tensor] = {}
        wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name in names:
            tensor = None if anew or self.dtype_of(part, name) != source.dtypes[name] else source.held(name)
            if tensor is not None:
                held[name] = tensor
            else:
                wanted[name] = source.shapes[name], self.dtype_of(part, name)
        made = room_for(wanted, self.folder)
        with self.bars.step(f"reading {part}", sum(tensor.nbytes for tensor in made.values())) as advance:
            for batch in _batches(made):
                source.fill(batch)
                advance(sum(tensor.nbytes for tensor in batch.values()))
        return {**held, **made}

    def read_all(self) -> dict[str, dict[str, Tensor]]:
        """All parts."""
        return {part: self.read(part, self.opened.names(part)) for part in self.opened.parts}


def _batches(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    batch: dict[str, Tensor] = {}
    held = 0
    for name, tensor in tensors.items():
        if batch and held + tensor.nbytes > _AT_ONCE:
            yield batch
            batch, held = {}, 0
        batch[name] = tensor
        held += tensor.nbytes
    if batch:
        yield batch
