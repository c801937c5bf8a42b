"""What a step sends is counted from its first batch to its optimizer's step, in the right phase, and nothing else is."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision

from lightning_ted.callbacks import CommunicationMonitor
from lightning_ted.collectives.recorder import CommRecorder, TrafficKey
from lightning_ted.errors import UnsupportedError
from lightning_ted.recompute import RecomputeOptions
from tests.support.pool import Pools
from tests.support.runs import Toy, loader, trainer

Calls = Counter[TrafficKey]
#: All-to-alls of the MoE layer's forward: how many rows, there, and back.
FORWARD = 3


class _Reads(L.Callback):
    """Reads the last step at the end of every batch: the recorder, or why there is none."""

    def __init__(self) -> None:
        self.read: list[Any] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        try:
            self.read.append(trainer.strategy.communication)
        except UnsupportedError as error:
            self.read.append(str(error))


class _Everything(L.Callback):
    """Counts whatever the mesh sends from the first batch to the last one, and all that is read of single steps."""

    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.outer = CommRecorder()
        trainer.strategy.mesh.ledger.recorder = self.outer


def _fit(
    layout: str = "tp2",
    steps: int = 5,
    module: Toy | None = None,
    recompute: Any = None,
    late: bool = False,
    **options: Any,
) -> list[Any]:
    """What is read at the end of each batch."""
    reads = _Reads()
    run = trainer(layout, max_steps=steps, callbacks=[reads, *options.pop("callbacks", [])], **options)
    run.strategy.record_communication = True
    run.strategy._training_options = replace(run.strategy._training_options, overlap_weights=late)
    if recompute is not None:
        run.strategy._recompute, run.strategy._recomputed_blocks = RecomputeOptions(recompute), "MoE"
    run.fit(module or Toy("sgd"), loader(2), loader(2) if "val_check_interval" in options else None)
    return reads.read


def _in_phase(step: CommRecorder, phase: str) -> Counter[tuple[str, str]]:
    return Counter({(key.kind, key.axis): n for key, n in step.calls_by.items() if key.phase == phase})


# -- phases --------------------------------------------------------------------------------------------------------------


def _phases(clip: float | None) -> dict[str, Counter[tuple[str, str]]]:
    step = _fit(gradient_clip_val=clip)[-1]
    return {key.phase: _in_phase(step, key.phase) for key in step.calls_by}


@pytest.mark.parametrize("clip", [None, 0.1])
def test_each_collective_counts_in_the_phase_that_it_belongs_to(pools: Pools, clip: float | None) -> None:
    for phases in pools(4).run(_phases, clip):
        assert phases.keys() == {"forward", "backward", "optimizer"}
        assert phases["forward"]["all_to_all", "expert"] == FORWARD
        assert phases["backward"]["all_to_all", "expert"] == 2
        assert not {"data", "expert_data", "world"} & {axis for _, axis in phases["forward"]}
        # Gradients, and which of them there are.
        assert phases["backward"]["reduce_scatter", "data"] > 0
        assert phases["backward"]["all_reduce", "world"] == 1
        # Weights, and the norm.
        assert phases["optimizer"]["all_gather", "data"] > 0
        assert phases["optimizer"]["all_reduce", "world"] == (clip is not None)
        assert {axis for _, axis in phases["optimizer"]} <= {"data", "expert_data", "world"}


def _loss_scaling() -> Counter[tuple[str, str]]:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return _in_phase(_fit(plugins=[MixedPrecision("16-mixed", "cpu", scaler)])[-1], "optimizer")


def test_the_search_for_an_overflow_counts_as_optimizer(pools: Pools) -> None:
    assert [phase["all_reduce", "world"] for phase in pools(4).run(_loss_scaling)] == [1] * 4


class _Looks(Toy):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.trainer.strategy.grad_norm(optimizer)
        self.trainer.strategy.full_gradient("net.up.weight")


def _looking() -> tuple[Calls, Calls]:
    return _fit()[-1].calls_by, _fit(module=_Looks("sgd"))[-1].calls_by


def test_looking_at_gradients_counts_as_optimizer(pools: Pools) -> None:
    for plain, looking in pools(4).run(_looking):
        more = looking - plain
        assert {key.phase for key in more} == {"optimizer"}
        assert more["all_reduce", "world", "optimizer"] == more["all_gather", "tensor", "optimizer"] == 1


def _late_weights() -> tuple[Calls, Calls]:
    return _fit()[-1].calls_by, _fit(late=True)[-1].calls_by


def test_weights_that_arrive_late_count_in_the_step_that_has_made_them(pools: Pools) -> None:
    for at_once, late in pools(4).run(_late_weights):
        assert late == at_once


def _recomputed(mode: str) -> tuple[CommRecorder, CommRecorder]:
    """A step with and one without recomputation."""
    return _fit(recompute=mode)[-1], _fit()[-1]


def test_a_recomputation_that_communicates_is_told_from_the_forward(pools: Pools) -> None:
    for step, plain in pools(4).run(_recomputed, "full"):
        again = _in_phase(step, "recomputation")
        assert again["all_to_all", "expert"] == FORWARD
        assert not again - _in_phase(plain, "forward")
        for phase in ("forward", "backward", "optimizer"):
            assert _in_phase(step, phase) == _in_phase(plain, phase)
        assert not step.kept


def test_a_recomputation_from_what_was_kept_sends_nothing(pools: Pools) -> None:
    for step, plain in pools(4).run(_recomputed, "comm_aware"):
        assert step.calls_by == plain.calls_by
        assert step.kept["all_to_all", "expert"] > 0 and not plain.kept


def _kept() -> tuple[list[int], list[int]]:
    """By micro-batch, and by step of two of them."""
    found = []
    for accumulate in (1, 2):
        module = Toy("sgd", lr=0.0)  # routed alike: no weight moves
        read = _fit(steps=8 // accumulate, module=module, recompute="comm_aware", accumulate_grad_batches=accumulate)
        found.append([step.kept.total() for step in read[accumulate - 1 :: accumulate]])
    return found[0], found[1]


def test_kept_is_what_one_micro_batch_keeps_at_once(pools: Pools) -> None:
    results = pools(4).run(_kept)
    for single, accumulated in results:
        assert accumulated == [max(pair) for pair in zip(single[::2], single[1::2], strict=True)]
    assert any(len(set(single)) > 1 for single, _ in results)


# -- borders of a step ---------------------------------------------------------------------------------------------------


def _accumulated() -> tuple[Any, Calls, Calls]:
    twice = _fit(accumulate_grad_batches=2)
    assert all(a is b for a, b in zip(twice[1:-1:2], twice[2::2], strict=True))  # the running step does not show
    return twice[0], twice[-1].calls_by, _fit()[-1].calls_by


def test_all_batches_of_a_step_are_counted_once_it_is_complete(pools: Pools) -> None:
    for early, twice, once in pools(4).run(_accumulated):
        assert "once a step has been counted from its first batch" in early
        added = twice - once
        layers = ("tensor", "expert", "expert_tensor")
        assert added.keys() == {key for key in once if key.phase != "optimizer" and key.axis in layers}
        assert all(added[key] == once[key] for key in added)


def _evaluated() -> tuple[list[Calls], list[Calls], bool]:
    kept_after = []

    class _After(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, *args: Any) -> None:
            kept_after.append(trainer.strategy.communication)

    plain = [step.calls_by for step in _fit()]
    steps = _fit(val_check_interval=1, callbacks=[_After()])
    return plain, [step.calls_by for step in steps], all(a is b for a, b in zip(steps, kept_after, strict=True))


def test_evaluations_between_steps_are_not_counted(pools: Pools) -> None:
    for plain, evaluated, is_kept in pools(4).run(_evaluated):
        assert evaluated == plain
        assert is_kept


class _Manual(Toy):
    """Two optimizers, which both step in every other batch, each after a forward and backward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        dense = [p for name, p in self.named_parameters() if ".moe." not in name]
        return [torch.optim.SGD(dense, lr=0.01), torch.optim.SGD(self.net.moe.parameters(), lr=0.01)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx % 2 == 0:
            with self.trainer.strategy.block_backward_sync():
                self.manual_backward(self._loss(batch))
            return
        for optimizer in self.optimizers():
            self.manual_backward(self._loss(batch))
            optimizer.step()
            optimizer.zero_grad()


def _manual() -> tuple[bool, list[Counter[tuple[str, str]]]]:
    early, *steps = _fit(steps=6, module=_Manual())
    one_per_two_batches = isinstance(early, str) and steps[0] is steps[1] is not steps[2]
    return one_per_two_batches, [_in_phase(steps[-1], phase) for phase in ("forward", "optimizer")]


def test_optimizers_that_step_in_one_batch_count_together(pools: Pools) -> None:
    for one_per_two_batches, (forward, optimizer) in pools(4).run(_manual):
        assert one_per_two_batches
        assert forward["all_to_all", "expert"] == 3 * FORWARD  # one that accumulates, and two
        assert optimizer["all_gather", "data"] > 0  # of the first
        assert optimizer["all_gather", "world"] > 0  # of the second: the router's, which is a part on every rank


def _added_up() -> tuple[Calls, Calls]:
    everything = _Everything()
    steps = _fit(callbacks=[everything])
    return sum((step.bytes_by for step in steps), Counter()), +everything.outer.bytes_by


def test_the_steps_add_up_to_what_another_recorder_counts_meanwhile(pools: Pools) -> None:
    for steps, everything in pools(4).run(_added_up):
        # Before the first step, the ranks compare their batches.
        outside = everything - steps
        assert sum(outside.values()) < 100
        assert steps and not steps - everything


class _Interrupts(Toy):
    """Its first step fails when it has computed its gradients, and is left out."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        if batch_idx:
            return super().optimizer_step(epoch, batch_idx, optimizer, closure)

        def fails() -> None:
            closure()
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            optimizer.step(fails)
        return None


def _interrupted() -> tuple[bool, bool]:
    failed, *steps = _fit(module=_Interrupts("sgd"))
    return isinstance(failed, str), steps[-1].calls_by == _fit()[-1].calls_by == steps[0].calls_by


def test_a_step_that_failed_leaves_nothing_behind(pools: Pools) -> None:
    assert pools(4).run(_interrupted) == [(True, True)] * 4


# -- on and off ----------------------------------------------------------------------------------------------------------


class _Watches(Toy):
    """Sees which recorder its collectives find."""

    def __init__(self) -> None:
        super().__init__("sgd")
        self.recorders: list[Any] = []

    def _loss(self, batch: Any) -> torch.Tensor:
        self.recorders.append(self.trainer.strategy.mesh.ledger.recorder)
        return super()._loss(batch)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.recorders.append(self.trainer.strategy.mesh.ledger.recorder)


def _off() -> tuple[bool, str]:
    reads = _Reads()
    run = trainer("tp2", max_steps=2, callbacks=[reads])
    run.fit(module := _Watches(), loader(2))
    return len(module.recorders) == 4 and not any(module.recorders), reads.read[-1]


def test_nothing_is_counted_unless_asked_for(pools: Pools) -> None:
    for is_off, message in pools(2).run(_off):
        assert is_off
        assert "`TEDStrategy(record_communication=True)`" in message


class _Switches(_Reads):
    """On after three batches, off after eight, on again after nine."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        super().on_train_batch_end(trainer, *args)
        if len(self.read) in (3, 8, 9):
            trainer.strategy.record_communication = len(self.read) != 8


def _switched() -> list[str | bool]:
    reads = _Switches()
    trainer("tp2", max_steps=7, callbacks=[reads], accumulate_grad_batches=2).fit(Toy("sgd"), loader(1))
    whole = _fit(accumulate_grad_batches=2)[-1].calls_by
    return [_reason(read) if isinstance(read, str) else read.calls_by == whole for read in reads.read]


def _reason(message: str) -> str:
    return "off" if "record_communication=False" in message else "none"


def test_only_whole_steps_are_reported_when_counting_is_switched_in_mid_run(pools: Pools) -> None:
    for read in pools(4).run(_switched):
        # Three batches off; on in the middle of a step, and from the next one's end; off again for one batch.
        assert read == ["off"] * 3 + ["none"] * 2 + [True] * 3 + ["off"] + ["none"] * 2 + [True] * 3


def _again() -> list[bool]:
    reads = _Reads()
    run = trainer("tp2", max_steps=1, callbacks=[reads], accumulate_grad_batches=2)
    run.strategy.record_communication = True
    run.fit(module := Toy("sgd"), loader(2))
    after = run.strategy.communication
    run.fit_loop.epoch_loop.max_steps = 2
    run.fit(module, loader(2))
    return [after is reads.read[1], isinstance(reads.read[2], str), run.strategy.communication is not after]


def test_a_fit_begins_without_the_counts_of_the_one_before(pools: Pools) -> None:
    assert pools(2).run(_again) == [[True] * 3] * 2


def _alone() -> tuple[Calls, Calls]:
    step = _fit("ep1", gradient_clip_val=0.1)[-1]
    return step.calls_by, step.bytes_by


def test_one_process_sends_nothing(pools: Pools) -> None:
    assert pools(1).run(_alone) == [(Counter(), Counter())]


# -- the callback --------------------------------------------------------------------------------------------------------


def _monitored(folder: str) -> list[CommRecorder]:
    """What is read at the end of each step of two batches."""
    reads = _Reads()
    options = {"callbacks": [CommunicationMonitor(), reads], "logger": CSVLogger(folder), "log_every_n_steps": 1}
    trainer("tp2", max_steps=4, accumulate_grad_batches=2, **options).fit(Toy("sgd"), loader(2))
    return reads.read[1::2]


def test_monitor_writes_what_rank_zero_sent(pools: Pools, tmp_path: Path) -> None:
    steps = pools(4).run(_monitored, str(tmp_path))[0]
    (found,) = tmp_path.rglob("communication.csv")
    rows = {
        TrafficKey(row["kind"], row["axis"], row["phase"]): row  # type: ignore[arg-type]
        for row in csv.DictReader(found.read_text().splitlines())
    }
    assert {row["steps"] for row in rows.values()} == {"4"}
    assert rows.keys() == {key for step in steps for key in step.calls_by}
    for key, row in rows.items():
        assert float(row["calls_per_step"]) == sum(step.calls_by[key] for step in steps) / 4
        assert float(row["bytes_per_step"]) == sum(step.bytes_by[key] for step in steps) / 4
    assert (found.parent / "communication.png").read_bytes().startswith(b"\x89PNG")
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        logged = [row for row in csv.DictReader(file) if row["sent_bytes"]]
    assert [float(row["sent_bytes"]) for row in logged] == [step.bytes_by.total() for step in steps]
    column = "sent_bytes/all_to_all/expert"
    assert [float(row[column]) for row in logged] == [step.bytes["all_to_all", "expert"] for step in steps]


def _unmonitored(folder: str) -> list[str]:
    run = trainer("ep1", max_steps=1, callbacks=[CommunicationMonitor(folder)])
    run.fit(Toy("sgd"), loader(2))
    return sorted(path.name for path in Path(folder).iterdir())


def test_monitor_of_one_process_writes_that_nothing_was_sent(pools: Pools, tmp_path: Path) -> None:
    assert pools(1).run(_unmonitored, str(tmp_path / "new")) == [["communication.csv", "communication.png"]]
