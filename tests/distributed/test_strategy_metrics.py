"""Logged values and metrics count every sample once, however many ranks saw it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.distributed import ReduceOp
from torchmetrics import MeanMetric, MetricCollection, SumMetric
from torchmetrics.classification import BinaryConfusionMatrix

from tests.support.pool import Pools
from tests.support.runs import SAMPLES, Toy, loader, trainer


class _Counting(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.count = SumMetric()
        self.matrix = BinaryConfusionMatrix()
        self.both = MetricCollection({"sum": SumMetric(), "mean": MeanMetric()})

    def configure_model(self) -> None:
        if not hasattr(self, "late"):
            self.late = SumMetric()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        n = len(batch[2])
        self.log("n", float(n), reduce_fx="sum", sync_dist=True)
        self.log("highest", float(batch[2].max()), reduce_fx="max", sync_dist=True)
        self.log("mean_id", batch[2].float().mean(), batch_size=n, sync_dist=True)
        self.count(n)
        self.late(n)
        self.matrix((batch[1] > 0).long(), (batch[0][:, :1] > 0).long())
        self.both(batch[2].float())
        self.log("count", self.count)
        self.log("late", self.late)
        self.log_dict(self.both)

    def on_validation_epoch_end(self) -> None:
        self.total = int(copy.deepcopy(self.matrix).compute().sum())
        self.matrix.reset()


def _logged(layout: str, length: int) -> tuple[dict[str, float], int]:
    run = trainer(layout)
    result = run.validate(module := _Counting(), loader(4, length), verbose=False)
    return dict(result[0]), module.total


def test_logged_values_and_metrics_count_each_sample_once(pools: Pools) -> None:
    for layout in ("tp2", "tp4", "tp1 ep4"):
        for logged, total in pools(4).run(_logged, layout, SAMPLES):
            assert logged["n"] == logged["count"] == logged["late"] == total == SAMPLES
            assert logged["highest"] == SAMPLES - 1
            assert logged["sum"] == sum(range(SAMPLES)) and logged["mean"] == logged["mean_id"] == (SAMPLES - 1) / 2


class _Uneven(Toy):
    """Data rank 0 sees batches of 3 samples, data rank 1 of 4."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        rank = self.trainer.strategy.data_parallel_rank  # type: ignore[attr-defined]
        n = 3 + rank
        self.log("mean", float(rank), batch_size=n, sync_dist=True)


def _uneven() -> float:
    return trainer("tp2").validate(_Uneven(), loader(4), verbose=False)[0]["mean"]


def test_mean_over_uneven_batches_is_weighted_and_not_rounded(pools: Pools) -> None:
    for mean in pools(4).run(_uneven):
        assert abs(mean - 4 / 7) < 1e-6


class _Probing(Toy):
    def on_train_start(self) -> None:
        strategy, rank = self.trainer.strategy, dist.get_rank()
        value = torch.tensor(float(rank))
        self.results = {
            "mean": strategy.reduce(value).item(),
            "sum": strategy.reduce(value, reduce_op="sum").item(),
            "op": strategy.reduce(value, reduce_op=ReduceOp.MAX).item(),  # type: ignore[arg-type]
            "world": strategy.reduce(value, group=dist.group.WORLD, reduce_op="sum").item(),
            "int": strategy.reduce(torch.tensor(rank)).item(),
            "half": strategy.reduce(torch.tensor(float(rank), dtype=torch.bfloat16)).dtype,
            "other": strategy.reduce("text"),
            "all": strategy.reduce_boolean_decision(rank != 3, all=True),
            "any": strategy.reduce_boolean_decision(rank == 3, all=False),
            "none": strategy.reduce_boolean_decision(False, all=False),
            "every": strategy.reduce_boolean_decision(True, all=True),
            "gathered": strategy.all_gather(value).tolist(),
            "kept": value.item(),
        }


def _probe() -> dict[str, Any]:
    run = trainer("tp2", max_steps=1)
    run.fit(module := _Probing(), loader())
    return module.results


def test_reduce_is_over_data_and_decisions_are_over_the_world(pools: Pools) -> None:
    for rank, r in enumerate(pools(4).run(_probe)):
        peers = [rank % 2, rank % 2 + 2]
        assert (r["mean"], r["sum"], r["op"], r["int"]) == (sum(peers) / 2, sum(peers), max(peers), sum(peers) / 2)
        assert r["world"] == 6 and r["half"] is torch.bfloat16 and r["other"] == "text" and r["kept"] == rank
        assert (r["all"], r["any"], r["none"], r["every"]) == (False, True, False, True)
        assert r["gathered"] == [0.0, 1.0, 2.0, 3.0]


class _Scores(Toy):
    """Improves by one every epoch; on rank 3, it stays as it was unless the value is synchronised."""

    def __init__(self, sync: bool) -> None:
        super().__init__()
        self.sync = sync

    def on_validation_epoch_end(self) -> None:
        bad = not self.sync and dist.get_rank() == 3
        self.log("score", 0.0 if bad else float(self.current_epoch), sync_dist=self.sync)


def _best(folder: str) -> tuple[str, float]:
    saver = ModelCheckpoint(folder, "{epoch}", monitor="score", mode="max")
    run = trainer("tp2", max_epochs=4, callbacks=[saver], enable_checkpointing=True)
    run.fit(_Scores(sync=True), loader(), loader())
    return saver.best_model_path, float(saver.best_model_score)  # type: ignore[arg-type]


def test_model_checkpoint_follows_an_improving_metric(pools: Pools, tmp_path: Path) -> None:
    for path, score in pools(4).run(_best, str(tmp_path)):
        assert Path(path).name == "epoch=3.ckpt" and score == 3.0
    assert [file.name for file in tmp_path.iterdir()] == ["epoch=3.ckpt"]


def _stopped() -> int:
    run = trainer("tp2", max_epochs=6, callbacks=[EarlyStopping("score", mode="max", patience=2)])
    run.fit(_Scores(sync=False), loader(), loader())
    return run.current_epoch


def test_early_stopping_of_one_rank_stops_all_at_the_same_step(pools: Pools) -> None:
    assert set(pools(4).run(_stopped)) == {3}
