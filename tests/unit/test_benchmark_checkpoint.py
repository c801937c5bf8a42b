"""The benchmark of checkpoints runs, and counts what it says."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import checkpoint
from benchmarks.checkpoint_rank import (
    FORMS,
    THEIR_FILE,
    THEIRS,
    Meter,
    config_of,
    files_of,
    load_rank,
    save_rank,
    weights_of,
)
from benchmarks.checkpoint_report import lines, merge
from tests.support.pool import Pools

SHAPE = {"d_model": 32, "num_heads": 2, "ffn_width": 64, "expert_width": 64, "num_layers": 2, "num_experts": 4}

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def _save(seconds: float, peak: float) -> dict[str, float]:
    return {"returned": seconds, "visible": seconds, "stored": 2 * seconds, "peak": peak, "files": 5e6}


def _run(factor: float) -> dict[str, dict[str, list[list[dict[str, float]]]]]:
    def ranks(seconds: float) -> list[list[dict[str, float]]]:
        return [[_save(seconds * k, 1e6) for k in (1, 9, 2)], [_save(seconds * k, 3e6) for k in (1, 1, 3)]]

    loads = [[{"seconds": factor, "peak": 4e6}], [{"seconds": factor / 2, "peak": 2e6}]]
    return {
        checkpoint.BARE: {"save": ranks(1.0)},
        "directory": {"save": ranks(factor), "load": loads},
        THEIRS: {"save": ranks(4.0), "load": loads},
    }


def test_rows_are_medians_of_the_rank_that_needs_most() -> None:
    rows = merge([_run(1.0), _run(2.0), _run(8.0)])
    save, load = rows["directory"]["save"], rows["directory"]["load"]
    # Of the repeats 1, 9 and 3 times as long; of the runs, the second.
    assert (save["returned"], save["stored"], save["peak"]) == (6.0, 12.0, 3e6)
    assert (load["seconds"], load["peak"]) == (2.0, 4e6)


def test_ratios_are_of_one_run() -> None:
    rows = merge([_run(1.0), _run(2.0), _run(8.0)])
    assert rows["directory"]["save"]["returned_ratio"] == 0.5
    assert rows["directory"]["load"]["seconds_ratio"] == 1.0
    assert "returned_ratio" not in rows[THEIRS]["save"] and "returned_ratio" not in rows[checkpoint.BARE]["save"]
    text = "\n".join(lines(rows))
    assert all(FORMS[form].title in text for form in ("directory", THEIRS)) and checkpoint.BARE in text
    assert "6.000  0.50    12.000  0.50      3.0  1.00      5.0" in text


@on_linux
def test_peak_is_of_all_parts_together() -> None:
    size = 2**24
    meter = Meter()
    with meter.measure():
        kept = torch.ones(size, dtype=torch.uint8)
    between = torch.ones(size, dtype=torch.uint8)  # nobody's
    with meter.measure():
        freed = torch.ones(2 * size, dtype=torch.uint8)
        time.sleep(0.05)
        del freed
    assert kept.sum() == between.sum() == size
    assert 2.9 * size < meter.peak < 3.3 * size
    assert 0.9 * size < meter.kept < 1.3 * size
    assert meter.seconds >= 0.05


@on_linux
def test_pages_of_files_are_nobodys_memory(tmp_path: Path) -> None:
    torch.save({"state_dict": {"weight": torch.ones(2**22)}}, tmp_path / "file.ckpt")
    meter = Meter()
    with meter.measure():
        assert weights_of(tmp_path / "file.ckpt")["weight"].sum() == 2**22
    assert meter.peak < 2**22


def test_form_without_what_it_reads_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        checkpoint.arguments(["--forms", "directory_other"])
    assert "directory_other reads what directory writes" in capsys.readouterr().err


def _measure(folder: str, form: str) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    saves = save_rank(form, SHAPE, folder, 2) if FORMS[form].writes else []
    loads = load_rank(form, SHAPE, folder, 2, cold=True) if FORMS[form].reads is not None else []
    return saves, loads


@on_linux
def test_all_forms_hold_the_same_weights(pools: Pools, tmp_path: Path) -> None:
    size = checkpoint.BYTES * config_of(SHAPE).num_params()
    for form in FORMS:
        for saves, loads in pools(4).run(_measure, str(tmp_path), form):
            assert len(saves) == 2 * FORMS[form].writes and len(loads) == 2 * (FORMS[form].reads is not None)
            assert all(0 < one["returned"] <= one["visible"] <= one["stored"] for one in saves)
            assert all(one["files"] > size for one in saves)
            assert all(one["seconds"] > 0 and one["peak"] >= 0 for one in loads)
        if FORMS[form].writes:
            (left,) = (tmp_path / form).iterdir()
            assert len(files_of(left)) > 1 or not FORMS[form].is_directory
    checkpoint.require_same_weights(list(FORMS), str(tmp_path))
    path = next((tmp_path / THEIR_FILE).iterdir())
    changed = weights_of(path)
    changed["decoder.head.weight"] = changed["decoder.head.weight"] + 1
    shutil.rmtree(tmp_path / THEIR_FILE)
    (tmp_path / THEIR_FILE).mkdir()
    torch.save({"state_dict": changed}, path)
    with pytest.raises(RuntimeError, match=r"'decoder\.head\.weight' differs"):
        checkpoint.require_same_weights(list(FORMS), str(tmp_path))


@on_linux
def test_file_system_is_told(tmp_path: Path) -> None:
    assert checkpoint.file_system(Path("/proc/self")) == "proc"
    assert checkpoint.file_system(tmp_path)
