"""How many tokens the whole job trains on per second."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor
from typing_extensions import override

from lightning_ted.errors import TEDError


def count_tokens(batch: Any) -> int:
    """Number of elements of the first integer tensor in ``batch``: by custom, the token ids.

    Looks into mappings under ``input_ids`` first, then into mappings and sequences in their order; 0 if there is none.
    """
    if isinstance(batch, Tensor):
        is_index = not (batch.is_floating_point() or batch.is_complex() or batch.dtype == torch.bool)
        return batch.numel() if is_index else 0
    if isinstance(batch, Mapping):
        parts = [batch["input_ids"]] if "input_ids" in batch else list(batch.values())
    elif isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)):
        parts = list(batch)
    else:
        parts = []
    return next((count for count in map(count_tokens, parts) if count), 0)


def data_parallel_size(trainer: Trainer) -> int:
    """How many different batches a training step of the whole job reads."""
    strategy = trainer.strategy
    if not isinstance(strategy, ParallelStrategy):
        return 1
    kwargs = strategy.distributed_sampler_kwargs
    return int(kwargs["num_replicas"]) if kwargs else 1


class TokenThroughput(Callback):
    """Show the training speed of the whole job, in tokens per second, in the progress bar and the logs.

    The tokens of a batch are counted on this rank and multiplied by the number of data-parallel ranks; tensor-parallel
    ranks share a batch. Validation does not count as time.

    Args:
        window: Number of batches that the speed is averaged over.
        tokens_in_batch: Counts the tokens of a batch; None for the size of its first integer tensor.

    """

    def __init__(self, window: int = 20, tokens_in_batch: Callable[[Any], int] | None = None) -> None:
        if window < 1:
            raise TEDError(f"`window={window}` must be at least 1.")
        self.window = window
        self.tokens_in_batch = tokens_in_batch or count_tokens
        self._marks: deque[tuple[float, int]] = deque(maxlen=window + 1)
        self._tokens = 0

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._marks:
            self._marks.append((time.perf_counter(), self._tokens))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._tokens += self.tokens_in_batch(batch) * data_parallel_size(trainer)
        self._marks.append((time.perf_counter(), self._tokens))
        (start, before), (end, after) = self._marks[0], self._marks[-1]
        if after > before and end > start:
            pl_module.log("tokens/s", float(round((after - before) / (end - start))), prog_bar=True)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._marks.clear()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._marks.clear()
