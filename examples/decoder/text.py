"""Real text that every Python brings along: the standard library's sources and the topics of ``help()``, as bytes.

Nothing is downloaded and nothing is written. Documents (source files, help topics) are shuffled by a checksum of their
name, and one in ten is kept for validation, so that training and validation share no document.
"""

from __future__ import annotations

import os
import zlib
from functools import cached_property
from pathlib import Path
from pydoc_data.topics import topics

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

VALIDATION_SHARE = 10  # one document in ten


def documents() -> dict[str, bytes]:
    """Name and bytes of every document, in an order that mixes them and is always the same."""
    sources = {path.name: path.read_bytes() for path in Path(os.path.dirname(os.__file__)).glob("*.py")}
    helps = {f"help({name})": text.encode() for name, text in topics.items()}
    named = sources | helps
    return {name: named[name] for name in sorted(named, key=lambda name: (zlib.crc32(name.encode()), name))}


def split(num_bytes: int) -> tuple[bytes, bytes]:
    """At most ``num_bytes`` of training text, and at most a tenth of that of validation text."""
    train, validation = [], []
    for index, document in enumerate(documents().values()):
        (train if index % VALIDATION_SHARE else validation).append(document)
    return b"\n".join(train)[:num_bytes], b"\n".join(validation)[: num_bytes // 10]


def unigram_entropy(text: bytes) -> float:
    """Entropy of the bytes of ``text``, in nats: the loss of knowing how often each byte occurs, and no more."""
    counts = torch.bincount(torch.frombuffer(bytearray(text), dtype=torch.uint8), minlength=256).double()
    share = counts[counts > 0] / counts.sum()
    return float(-(share * share.log()).sum())


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Non-overlapping windows of a text, each with its targets: the same window one byte later.

    Args:
        text: The bytes.
        sequence_length: Length of a window, in bytes.

    """

    def __init__(self, text: bytes, sequence_length: int) -> None:
        self.data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.sequence_length = sequence_length

    def __len__(self) -> int:
        return (len(self.data) - 1) // self.sequence_length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self.sequence_length
        window = self.data[start : start + self.sequence_length + 1].long()
        return window[:-1], window[1:]


class TextDataModule(L.LightningDataModule):
    """The text of the standard library, one token per byte.

    Args:
        sequence_length: Length of a window, in bytes; at most the model's.
        batch_size: Windows per batch of one data-parallel rank.
        num_bytes: Upper limit of the training text, in bytes; the validation text is at most a tenth of it.

    """

    def __init__(self, sequence_length: int = 256, batch_size: int = 16, num_bytes: int = 4_000_000) -> None:
        super().__init__()
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.num_bytes = num_bytes

    @cached_property
    def texts(self) -> tuple[bytes, bytes]:
        """The training and the validation text."""
        return split(self.num_bytes)

    @cached_property
    def unigram_entropy(self) -> float:
        """Entropy of the validation bytes, in nats: the loss to beat."""
        return unigram_entropy(self.texts[1])

    def setup(self, stage: str) -> None:
        train, validation = self.texts
        rank_zero_info(
            f"Text: {len(train):,} bytes to train on, {len(validation):,} to validate on, "
            f"whose unigram entropy is {self.unigram_entropy:.3f} nats per byte."
        )

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        windows = Windows(self.texts[0], self.sequence_length)
        return DataLoader(windows, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(Windows(self.texts[1], self.sequence_length), self.batch_size)
