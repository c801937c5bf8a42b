"""What benchmarks count where torch dispatches collectives is what the strategy's own recorder counts."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest

from benchmarks.collectives import CollectiveBytes
from lightning_ted import TEDStrategy
from tests.support.pool import Pools
from tests.support.runs import Toy, loader


class _Both(L.Callback):
    def __init__(self) -> None:
        self.found: list[tuple[int, int]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.counter = CollectiveBytes()
        self.counter.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.counter.__exit__(None, None, None)
        assert isinstance(trainer.strategy, TEDStrategy)
        recorded = trainer.strategy.communication.bytes
        self.found.append((sum(self.counter.sent.values()), sum(recorded.values())))


def _counted(tensor: int, expert: int) -> list[tuple[int, int]]:
    both = _Both()
    run = L.Trainer(
        accelerator="cpu",
        devices=4,
        strategy=TEDStrategy(tensor_parallel_size=tensor, expert_parallel_size=expert, record_communication=True),
        max_steps=3,
        callbacks=[both],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    run.fit(Toy(), loader())
    return both.found


@pytest.mark.parametrize(("tensor", "expert"), [(2, 2), (1, 4), (4, 1)])
def test_both_count_the_same(pools: Pools, tensor: int, expert: int) -> None:
    for found in pools(4).run(_counted, tensor, expert):
        for dispatched, recorded in found[1:]:  # the first step has audits, which are not recorded
            assert dispatched == recorded > 0
