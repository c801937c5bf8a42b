"""The benchmark of duplicate token dropping and communication-aware checkpointing runs, and counts what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import ablation
from benchmarks.ablation_rank import BASELINE, BOTH, CollectiveClock, purpose, same_losses
from benchmarks.ablation_report import draw, lines, merge, verdict
from benchmarks.namespaces import TOOLS, NodesUnavailableError, TwoNodes, reason_for_none
from lightning_ted.collectives import primitives
from lightning_ted.mesh import Axis

REASON = reason_for_none()
needs_nodes = pytest.mark.skipif(REASON is not None, reason=f"no two nodes on this machine: {REASON}")


def _step(seconds: float, **blocked: float) -> dict[str, Any]:
    sent = {"all_to_all/expert/forward": 8e6, "all_to_all/expert/backward": 4e6}
    found = {"seconds": seconds, "cpu": 0.5, "blocked": blocked, "bytes": sent, "calls": dict.fromkeys(sent, 2)}
    return found | {"kept": {"all_to_all/expert": 3e6}, "link": 5e6}


def _rank(steps: dict[str, list[dict[str, Any]]], peak: float) -> dict[str, Any]:
    variants = {name: {"peak": peak, "steps": own} for name, own in steps.items()}
    return {"variants": variants, "losses": dict.fromkeys(steps, "same bits"), "parameters": 1}


def _rows(speedup: float = 2.0) -> dict[str, dict[str, Any]]:
    def rank(waits: float, peak: float) -> dict[str, Any]:
        slow = [_step(factor * 2.0, all_to_all=factor * waits, end=factor * 0.1) for factor in (1, 1, 4)]
        fast = [_step(step["seconds"] / speedup, all_to_all=0.1) for step in slow]
        return _rank({BASELINE: slow, BOTH: fast}, peak)

    return merge([[rank(1.0, 1e6), rank(0.5, 3e6), rank(1.0, 2e6), rank(0.5, 2e6)]])


def test_parts_of_a_step_add_up_to_the_median() -> None:
    row = _rows()[BASELINE]
    assert row["seconds"] == pytest.approx(2.0)
    assert row["split"]["all_to_all"] == pytest.approx(0.75)
    assert row["split"]["rest"] == pytest.approx(0.1)
    assert row["split"]["compute"] == pytest.approx(1.15)
    assert sum(row["split"].values()) == pytest.approx(row["seconds"])
    assert row["cpu_seconds"] == pytest.approx(4 * 0.5)
    assert row["link_bytes_per_node"] == 5e6 and row["peak_bytes"] == 3e6
    assert sum(row["bytes"].values()) == 12e6 and sum(row["kept"].values()) == 3e6


def test_ratios_are_of_steps_that_took_turns() -> None:
    row = _rows(2.0)[BOTH]
    assert row["speedup"] == 2.0 and row["speedup_quartiles"] == (2.0, 2.0)


@pytest.mark.parametrize(("speedup", "says"), [(1.25, "NOT met"), (1.27, "met")])
def test_verdict_holds_the_ratio_against_the_paper(speedup: float, says: str) -> None:
    assert verdict(_rows(speedup)).endswith(f": {says}")
    assert "not both been run" in verdict({BOTH: {}})


def test_tables_and_picture_are_made(tmp_path: Path) -> None:
    text = "\n".join(lines(_rows()))
    assert "all_to_all/expert" in text and "8.00 / 0.00 / 4.00 / 0.00 (4)" in text
    pytest.importorskip("matplotlib")
    draw(_rows(), "title", tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 1000


def test_losses_of_other_bits_are_refused() -> None:
    compared = same_losses({BASELINE: [5.0, 4.0], "cac": [5.0, 4.0], "dtd": [5.0, 4.00001], BOTH: [5.0, 4.00001]})
    assert compared == {BASELINE: "same bits", "cac": "same bits", "dtd": "2.5e-06", BOTH: "2.5e-06"}
    with pytest.raises(RuntimeError, match=r"`cac`.*`baseline`, which sends the same"):
        same_losses({BASELINE: [5.0], "cac": [5.000001]})
    with pytest.raises(RuntimeError, match=r"`dtd`.*not \[5.0\] to rounding"):
        same_losses({BASELINE: [5.0], "dtd": [5.1]})


def test_waiting_counts_for_what_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    class Operators:
        def all_to_all_single(self, tensor: torch.Tensor, *_: object) -> torch.Tensor:
            return tensor

        def wait_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor

    operators = Operators()
    monkeypatch.setattr(primitives, "_ops", operators)
    # The axis has no group: the stand-ins send nothing.
    monkeypatch.setattr(Axis, "group_name", "none")
    with CollectiveClock() as clock:
        rows = torch.ones(2, 3)
        primitives.all_to_all_rows(rows, [1, 1], [1, 1], Axis("expert", 2))
        assert set(clock.seconds) == {"all_to_all"}
        primitives.wait(rows)  # nothing of ours
        assert set(clock.seconds) == {"all_to_all", "other"}
    assert primitives._ops is operators


def test_purposes_tell_layers_from_training() -> None:
    assert purpose("all_reduce", "tensor", "backward") == "all_reduce"
    assert purpose("reduce_scatter", "data", "backward") == "gradients"
    assert purpose("all_gather", "data", "optimizer") == "weights"
    assert purpose("all_reduce", "world", "forward") == "all_reduce"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--widths", "100"], "--widths: '100' must be a positive multiple of 64"),
        (["--rate", "0"], "--rate: '0' must be a positive number"),
        (["--steps", "0"], "--steps: '0' must be an integer of at least 1"),
        (["--experts", "3"], "--experts: '3' must be a positive multiple of 2"),
        (["--top-k", "9"], "--top-k: 9 is more than the 8 experts of --experts"),
    ],
)
def test_arguments_that_cannot_be_are_refused(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        ablation.arguments(given)
    assert message in capsys.readouterr().err


def test_machine_without_tools_skips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for tool in TOOLS[:-1]:
        (tmp_path / tool).write_text("#!/bin/false\n")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["ablation", "--out", str(tmp_path / "results" / "ablation.json")])
    ablation.main()
    assert "Skipped" in (said := capsys.readouterr().out) and "the program tc" in said
    assert not (tmp_path / "results").exists()


def test_machine_that_permits_no_namespace_skips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tool in TOOLS:
        (tmp_path / tool).write_text("#!/bin/sh\necho Operation not permitted >&2\nexit 1\n")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NodesUnavailableError, match=r"makes no network namespace: Operation not permitted"), TwoNodes():
        pass


@needs_nodes
def test_nodes_send_no_faster_than_their_link() -> None:
    with TwoNodes(rate=8.0) as nodes:
        shown = [subprocess.check_output([*nodes.within(n), "tc", "qdisc", "show"], text=True) for n in (0, 1)]
        ping = subprocess.run([*nodes.within(0), "ip", "route", "get", "10.213.0.2"], capture_output=True, text=True)
    assert all("tbf" in text and "rate 8Mbit" in text for text in shown)
    assert "dev ted0" in ping.stdout


@needs_nodes
def test_experiment_runs_between_two_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    least = {"widths": 64, "layers": 2, "sequence": 16, "sequences": 2, "warmup": 1, "steps": 1, "repeats": 1}
    sizes = [text for name, size in least.items() for text in (f"--{name}", str(size))]
    out = tmp_path / "ablation.json"
    monkeypatch.setattr(sys, "argv", ["ablation", "--variants", "baseline", "both", *sizes, "--out", str(out)])
    ablation.main()
    rows = json.loads(out.read_text())["models"][0]["rows"]
    moved = {
        name: {key: row["bytes"][f"all_to_all/expert/{key}"] for key in ("forward", "backward")}
        for name, row in rows.items()
    }
    assert rows[BOTH]["bytes"].get("all_to_all/expert/recomputation", 0) == 0
    assert rows[BASELINE]["bytes"]["all_to_all/expert/recomputation"] > 0.9 * moved[BASELINE]["forward"]
    assert moved[BASELINE]["backward"] == pytest.approx(2 * moved[BOTH]["backward"])
    assert all(row["link_bytes_per_node"] > 0 for row in rows.values())
    assert "times faster" in out.with_suffix(".txt").read_text()
