"""The benchmark of the optimizer step runs, and counts what it says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import overlap, spike
from benchmarks.optimizer_step import SLACK, slice_lines, slice_row, slice_verdict, variants
from benchmarks.owned_slice import measure_slice, slice_sizes
from tests.support.pool import Pools

SIZE = 30_000
TILE = 2**10 + 1


@pytest.mark.parametrize("total", [30_000, 100_000_000])
def test_slice_has_parameters_of_all_sizes(total: int) -> None:
    sizes = slice_sizes(total)
    assert sum(sizes) == total
    assert max(sizes) == 2 * total // 5
    assert min(sizes) >= 1


def test_tiles_that_cut_parameters_step_as_torch_does() -> None:
    kinds = {title: kind for title, kind in variants([TILE, None]).items() if "offload" not in kind}
    threads = torch.get_num_threads()
    runs = {title: [measure_slice(slice_sizes(SIZE), kind, "cpu", 2, [threads])] for title, kind in kinds.items()}
    rows: dict[str, dict[str, Any]] = {title: slice_row(found, SIZE, kinds[title]) for title, found in runs.items()}
    for title, row in rows.items():
        row |= slice_verdict(row, rows["torch fused"], kinds[title], SIZE)
    tiled = rows[f"tiles of {TILE}"]
    assert tiled["same_bits"] and rows["untiled"]["same_bits"]
    assert tiled["allowed_bytes"] == 4 * TILE + SLACK
    assert 0 < tiled["wall"][str(threads)] < 10
    assert set(tiled["meets_targets"]) == {"bits", "memory", "time"}
    assert any("tiles of" in line for line in slice_lines({"size": SIZE, "device": "cpu", "rows": rows}))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_step_takes_the_memory_of_one_tile() -> None:
    # Tiles that are cut where the memory is aligned are not equally long, so the largest is not the first.
    variant = {"tile_size": 2**20}
    extra = measure_slice(slice_sizes(5_000_000), variant, "cpu", 0, [])["extra_bytes"]
    assert 2**21 < extra <= 2**22 + SLACK


@pytest.mark.parametrize("experts", [4, 32, 128])
def test_slice_of_a_rank_is_what_the_paper_predicts(experts: int) -> None:
    base = spike.Base(layers=4, width=256)
    owned = sum(base.rank_sizes(experts, 32))
    assert 4 * owned == pytest.approx(base.predicted_spike(experts, 32), rel=1e-3)


def test_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    keys = ("slice", "predicted_bytes", "untiled_bytes", "tile_bytes", "tiled_bytes")
    rows = [{"experts": experts, **dict.fromkeys(keys, 1e6 * experts)} for experts in (4, 8)]
    spike.draw(rows, spike.Base(), 32, tmp_path / "spike.png")
    assert (tmp_path / "spike.png").stat().st_size > 1000
    assert len(list(spike.lines(rows))) == 3


def _overlap() -> list[dict[str, Any]]:
    shape = {"d_model": 32, "ffn_width": 64, "expert_width": 32, "num_layers": 2, "num_experts": 4}
    shape |= {"num_heads": 2, "sequence_length": 8}
    return overlap.overlap_of_world("tp2_ep2", [2], [2**23, 2**10], 1, shape)


def test_buckets_are_reduced_while_backward_runs(pools: Pools) -> None:
    whole, small = overlap.merge(pools(4).run(_overlap))
    assert whole["sent_bytes"] == pytest.approx(small["sent_bytes"], rel=0.1)  # but for padding
    assert whole["buckets"] < small["buckets"]
    assert whole["early_share"] == small["early_share"] == 1.0
    assert all(0 < row[key] < 1 for row in (whole, small) for key in ("ahead", "possible"))
