import csv
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_ted.callbacks import CommunicationMonitor, communication
from lightning_ted.collectives.recorder import CommRecorder, Recorders, TrafficKey
from lightning_ted.errors import UnsupportedError
from lightning_ted.strategy.stepping import SteppingStrategy


class _Strategy:
    """Counts what it is told; until then, nothing."""

    record_communication = False
    step: CommRecorder | None = None

    def broadcast(self, value: Any) -> Any:
        return value

    @property
    def communication(self) -> CommRecorder:
        if self.step is None:
            raise UnsupportedError
        return self.step


def _step(sent: dict[tuple[str, str, str], int], kept: int = 0) -> CommRecorder:
    step = CommRecorder()
    for key, size in sent.items():
        step.calls_by[TrafficKey(*key)] += 1  # type: ignore[arg-type]
        step.bytes_by[TrafficKey(*key)] += size  # type: ignore[arg-type]
    if kept:
        step.note_kept("all_to_all", "expert", kept)
    return step


STEPS = [
    _step({("all_to_all", "expert", "forward"): 100, ("all_to_all", "expert", "backward"): 50}, kept=7),
    _step({("all_to_all", "expert", "forward"): 140, ("all_reduce", "world", "backward"): 0}, kept=9),
]


def _trainer(folder: Path, **options: Any) -> SimpleNamespace:
    defaults = {
        "strategy": _Strategy(),
        "global_step": 0,
        "log_every_n_steps": 1,
        "is_global_zero": True,
        "fast_dev_run": False,
        "log_dir": str(folder / "log"),
    }
    return SimpleNamespace(**{**defaults, **options})


def _run(monitor: CommunicationMonitor, trainer: SimpleNamespace, steps: list[CommRecorder]) -> list[dict[str, float]]:
    """Two batches to a step, after the first of which nothing is new; what was logged."""
    module = MagicMock()
    monitor.setup(trainer, module, "fit")
    for batch in range(2 * len(steps)):
        if batch % 2:
            trainer.global_step, trainer.strategy.step = batch // 2 + 1, steps[batch // 2]
        monitor.on_train_batch_end(trainer, module, None, None, batch)
    monitor.on_train_end(trainer, module)
    return [call.args[0] for call in module.log_dict.call_args_list]


def test_counting_is_switched_on_for_a_fit_only(tmp_path: Path) -> None:
    trainer, monitor = _trainer(tmp_path), CommunicationMonitor()
    monitor.setup(trainer, MagicMock(), "validate")
    assert not trainer.strategy.record_communication
    monitor.setup(trainer, MagicMock(), "fit")
    assert trainer.strategy.record_communication


def test_each_step_is_logged_once_under_names_that_stay(tmp_path: Path) -> None:
    first, second = _run(CommunicationMonitor(chart=False), _trainer(tmp_path), STEPS)
    assert first == {
        "sent_bytes": 150,
        "sent_bytes/forward": 100,
        "sent_bytes/recomputation": 0,
        "sent_bytes/backward": 50,
        "sent_bytes/optimizer": 0,
        "sent_bytes/all_to_all/expert": 150,
        "kept_bytes": 7,
    }
    assert second == {
        **first,
        "sent_bytes": 140,
        "sent_bytes/forward": 140,
        "sent_bytes/backward": 0,
        "sent_bytes/all_to_all/expert": 140,
        "sent_bytes/all_reduce/world": 0,
        "kept_bytes": 9,
    }


def test_table_has_means_of_all_steps_logged_or_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logged = _run(CommunicationMonitor(tmp_path / "own", every_n_steps=2), _trainer(tmp_path), STEPS)
    assert [step["sent_bytes"] for step in logged] == [140]
    rows = list(csv.reader((tmp_path / "own" / "communication.csv").read_text().splitlines()))
    assert rows == [
        ["kind", "axis", "phase", "steps", "calls_per_step", "bytes_per_step"],
        ["all_reduce", "world", "backward", "2", "0.5", "0.0"],
        ["all_to_all", "expert", "forward", "2", "1.0", "120.0"],
        ["all_to_all", "expert", "backward", "2", "0.5", "25.0"],
        ["all_to_all", "expert", "kept", "2", "", "9"],
    ]
    assert (tmp_path / "own" / "communication.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "rank 0" in shown and "means of 2 steps" in shown and "145" in shown


def test_chart_stacks_phases_and_leaves_out_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    bars: dict[str, Any] = {}
    plain = Axes.barh

    def barh(self: Axes, *args: Any, **options: Any) -> Any:
        bars[options["label"]] = (*args, options["left"])
        return plain(self, *args, **options)

    monkeypatch.setattr(Axes, "barh", barh)
    _run(CommunicationMonitor(), _trainer(tmp_path), STEPS)
    assert list(bars) == list(communication.PHASES)
    assert bars["forward"] == (range(2), [0.0, 120.0], [0.0, 0.0])
    assert bars["backward"] == (range(2), [0.0, 25.0], [0.0, 120.0])


@pytest.mark.parametrize(
    ("options", "steps"), [({"is_global_zero": False}, STEPS), ({"fast_dev_run": True}, STEPS), ({}, [])]
)
def test_nothing_is_written_by_other_ranks_in_a_trial_or_without_steps(
    tmp_path: Path, options: dict[str, Any], steps: list[CommRecorder]
) -> None:
    _run(CommunicationMonitor(chart=False), _trainer(tmp_path, **options), steps)
    assert not list(tmp_path.glob("log/*"))


def test_a_directory_that_cannot_be_made_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monitor = CommunicationMonitor(tmp_path / "file" / "folder")
    with pytest.raises(UnsupportedError, match=r"dirpath=.*cannot be made \(NotADirectoryError"):
        monitor.setup(_trainer(tmp_path), None, "fit")  # type: ignore[arg-type]


def test_a_directory_that_is_lost_costs_the_files_only(tmp_path: Path) -> None:
    monitor = CommunicationMonitor(tmp_path / "folder")
    trainer = _trainer(tmp_path)
    monitor.setup(trainer, None, "fit")  # type: ignore[arg-type]
    monitor._steps = 1
    (tmp_path / "folder").rmdir()
    with pytest.warns(UserWarning, match="cannot write to .*folder'"):
        monitor.on_train_end(trainer, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"dirpath": 3}, {"chart": "no"}])
def test_arguments_of_the_wrong_kind_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=f"{next(iter(options))}=.* must be "):
        CommunicationMonitor(**options)


def test_a_second_fit_begins_anew(tmp_path: Path) -> None:
    monitor = CommunicationMonitor(chart=False)
    _run(monitor, _trainer(tmp_path), STEPS)
    _run(monitor, _trainer(tmp_path), STEPS[:1])
    assert {row.steps for row in monitor.rows()} == {1}


def test_chart_without_matplotlib_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(communication, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install lightning-ted\[plots\].*`chart=False`"):
        CommunicationMonitor()
    CommunicationMonitor(chart=False)


def test_another_strategy_is_refused(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, strategy=SingleDeviceStrategy("cpu"))
    with pytest.raises(UnsupportedError, match="`SingleDeviceStrategy` does not count"):
        CommunicationMonitor(chart=False).setup(trainer, MagicMock(), "fit")


def test_frequency_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="`every_n_steps=0`"):
        CommunicationMonitor(every_n_steps=0)


def test_strategy_has_what_the_callback_looks_for() -> None:
    assert hasattr(SteppingStrategy, "record_communication")
    assert isinstance(SteppingStrategy.communication, property)


def test_several_recorders_count_the_same() -> None:
    one, other = CommRecorder(), CommRecorder()
    both = Recorders(one, other)
    both.note("all_gather", "data", 3)
    both.note_kept("all_to_all", "expert", 4)
    assert one.bytes_by == other.bytes_by == {TrafficKey("all_gather", "data", "forward"): 3}
    assert one.kept == other.kept == Counter({("all_to_all", "expert"): 4})
