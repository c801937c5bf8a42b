"""A run that was interrupted behind a step and is resumed ends in the same bits as one that was not."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, OnExceptionCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tests.support.pool import Pools
from tests.support.runs import FEATURES, Numbered, Toy, assert_close, assert_same_everywhere, trainer, whole_weights


class Noisy(Dataset):
    """Draws from every global generator."""

    def __init__(self) -> None:
        self.samples = Numbered(16)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, int]:
        x, y, number = self.samples[i]
        return x + 0.1 * torch.randn(FEATURES) + 0.1 * random.random() + 0.1 * float(np.random.rand()), y, number


class Stateful(DataLoader):
    """Goes on behind the batch at which its state was taken, without touching the ones before; in an order of its own rank."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(Noisy(), batch_size=2)
        self.order = list(range(rank, 16, size))
        self.batches: list[list[int]] = []

    def __iter__(self) -> Iterator[Any]:
        if not self.batches:
            chosen = torch.randperm(len(self.order)).tolist()
            self.batches = [[self.order[a], self.order[b]] for a, b in zip(chosen[::2], chosen[1::2], strict=True)]
        while self.batches:
            yield torch.utils.data.default_collate([self.dataset[i] for i in self.batches.pop(0)])

    def __len__(self) -> int:
        return len(self.order) // 2

    def state_dict(self) -> dict[str, Any]:
        return {"batches": [list(batch) for batch in self.batches]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches = [list(batch) for batch in state["batches"]]


class Module(Toy):
    """With dropout between and inside what is cut."""

    def __init__(self, stateful: bool) -> None:
        super().__init__()
        self.stateful = stateful
        self.net.down = nn.Sequential(nn.Dropout(0.2), self.net.down)
        self.net.tp_plan = {"up": "colwise", "down.1": "rowwise"}

    def _loss(self, batch: Any) -> Tensor:
        return F.mse_loss(F.dropout(self.net(batch[0]), 0.2, self.training), batch[1])

    def train_dataloader(self) -> DataLoader:
        if not self.stateful:
            return DataLoader(Noisy(), batch_size=2, shuffle=True)
        strategy: Any = self.trainer.strategy
        return Stateful(strategy.data_parallel_rank, strategy.data_parallel_size)


class Saves(Callback):
    """At each border: behind each batch, each validation, each epoch."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.saved: list[str] = []

    def _save(self, trainer: Any, border: str) -> None:
        self.saved.append(f"{self.folder}/{trainer.global_step} {border}")
        trainer.save_checkpoint(self.saved[-1])

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self._save(trainer, "batch")

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self._save(trainer, "validation")

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self._save(trainer, "epoch")


def _fit(layout: str, stateful: bool, path: str | None, **options: Any) -> Any:
    # Each process as if it were a new one.
    torch.manual_seed(len(path or ""))
    random.seed(1)
    np.random.seed(2)
    run = trainer(layout, max_epochs=2, use_distributed_sampler=not stateful, **options)
    run.fit(Module(stateful), val_dataloaders=DataLoader(Numbered(4)), ckpt_path=path)
    return run


def _resumed_everywhere(
    layout: str, stateful: bool, folder: str
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    saves = Saves(folder)
    whole = whole_weights(_fit(layout, stateful, None, callbacks=[saves]))
    borders = [path for path in saves.saved if stateful or not path.endswith("batch") or path.endswith("4 batch")]
    return whole, {Path(path).name: whole_weights(_fit(layout, stateful, path)) for path in borders}


@pytest.mark.parametrize(
    ("layout", "stateful"), [("tp2", True), ("tp2", False), ("tp2 file", False), ("ep4", True)], ids=str
)
def test_a_run_goes_on_at_every_border_with_the_same_bits(
    pools: Pools, tmp_path: Path, layout: str, stateful: bool
) -> None:
    results = pools(4).run(_resumed_everywhere, layout, stateful, str(tmp_path))
    for whole, resumed in results:
        assert len(resumed) > 3
        different = [
            border for border, weights in resumed.items() if not all(map(torch.equal, weights.values(), whole.values()))
        ]
        assert not different
    assert_same_everywhere([whole for whole, _ in results])


class _Order(Callback):
    """Notes the samples of evaluations in order, and saves behind the first epoch."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.seen: list[int] = []

    def on_validation_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.seen += batch[2].tolist()

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(f"{self.folder}/x")


def _orders_of_evaluations(folder: str) -> list[list[int]]:
    found = []
    for path in (None, f"{folder}/x"):
        notes = _Order(folder)
        run = trainer("tp2", max_epochs=2, use_distributed_sampler=False, callbacks=[notes])
        run.fit(Toy(), DataLoader(Numbered(4)), DataLoader(Numbered(8), shuffle=True), ckpt_path=path)
        found.append(notes.seen)
    return found


def test_evaluations_draw_the_same_numbers_in_a_run_that_goes_on(pools: Pools, tmp_path: Path) -> None:
    for whole, resumed in pools(2).run(_orders_of_evaluations, str(tmp_path)):
        assert len(whole) == 16 and sorted(whole[:8]) == list(range(8)) != whole[:8]
        assert whole[8:] == resumed == whole[:8]


def _in_double_precision(folder: str) -> list[dict[str, Tensor]]:
    weights = []
    for path in (None, f"{folder}/x"):
        run = trainer("tp2", max_epochs=2, precision="64-true", callbacks=[_Order(folder)])
        run.fit(Toy(), DataLoader(Numbered(4)), ckpt_path=path)
        weights.append(whole_weights(run))
    return weights


def test_weights_in_double_precision_are_read_as_they_were(pools: Pools, tmp_path: Path) -> None:
    for whole, resumed in pools(2).run(_in_double_precision, str(tmp_path)):
        assert all(weight.dtype == torch.float64 for weight in whole.values())
        assert_same_everywhere([whole, resumed])


def _in_another_layout(folder: str) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    saves = Saves(folder)
    whole = whole_weights(_fit("tp2", True, None, callbacks=[saves]))
    path = next(path for path in saves.saved if path.endswith("3 batch"))
    return whole, {layout: whole_weights(_fit(layout, True, path)) for layout in ("tp2", "tp2 ep4 etp1", "tp2 ep1")}


def test_a_run_goes_on_in_another_layout_of_the_same_batches(pools: Pools, tmp_path: Path) -> None:
    for whole, resumed in pools(4).run(_in_another_layout, str(tmp_path)):
        for weights in resumed.values():
            assert_close(weights, whole, 1e-5)


class _Terminates(Callback):
    """Behind the third step, as a scheduler does: every process."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)


def _terminated(folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    whole = whole_weights(_fit("tp2", True, None))
    with pytest.raises(SystemExit):
        _fit("tp2", True, None, callbacks=[_Terminates(), OnExceptionCheckpoint(folder)], enable_checkpointing=True)
    resumed = _fit("tp2", True, f"{folder}/on_exception.ckpt")
    return whole, whole_weights(resumed), os.listdir(folder)


def test_a_run_that_was_told_to_terminate_goes_on_with_the_same_bits(pools: Pools, tmp_path: Path) -> None:
    for whole, resumed, names in pools(4).run(_terminated, str(tmp_path)):
        assert_same_everywhere([whole, resumed])
        assert names == ["on_exception.ckpt"]
