"""Every layout trains like one process: outputs, raw gradients, global norm and weights, with plain SGD and with Adam."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from lightning_ted.recompute import RecomputeOptions
from tests.support.models import TinyConfig
from tests.support.parity import GRID, Case, Part, run_cases, whole_error
from tests.support.pool import Pools


def worst(results: Sequence[list[dict[str, Part]]]) -> dict[str, float]:
    """The largest error of each kind over the cases, each put together from all ranks."""
    cases = [
        {name: whole_error([rank[name] for rank in ranks]) for name in ranks[0]} for ranks in zip(*results, strict=True)
    ]
    names = dict.fromkeys(name for case in cases for name in case)
    # Not `max`, which passes over a NaN.
    return {
        name: sorted((case[name] for case in cases if name in case), key=lambda e: (e != e, e))[-1] for name in names
    }


def check(pools: Pools, cases: Sequence[Case], tolerance: float) -> None:
    errors = worst(pools(cases[0].world).run(run_cases, list(cases)))
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"{cases[0]}: relative errors above {tolerance}: {wrong}"


RECOMPUTE = [
    None,
    RecomputeOptions("full"),
    RecomputeOptions("comm_aware"),
    None,
    RecomputeOptions("full"),
    RecomputeOptions("comm_aware", "default"),
    None,
    RecomputeOptions("full"),
    RecomputeOptions("comm_aware", "all_to_all"),
]


def stepped(case: Case) -> list[Case]:
    """With every top-k, both ZeRO stages, with and without accumulation, and tiles that cut parameters at odd places.

    Accumulation costs as many passes as micro-batches; under which of the stages, the layouts take turns. Each layout trains
    without activation checkpointing, with it and with it aware of communication: in which of these ways, they take turns, and
    so they do with dispatchers and chunks. Layouts of eight ranks are many and slow: each trains in one way.
    """
    turn = GRID.index(case)
    ways = [(1, 1, 1, None), (2, 2, 1, 1000), (3, 1 + turn % 2, 3, 77)]
    if case.world == 8:
        ways = ways[turn % 3 :][:1]
    return [
        replace(
            case,
            config=replace(case.config, top_k=k),
            zero_stage=stage,
            accumulate=accumulate,
            tile_size=tile,
            recompute=RECOMPUTE[(turn + k) % len(RECOMPUTE)],
            dispatcher=("all_to_all", "hierarchical")[(turn + k) % 2],
            chunks=1 + (turn + k) % 3,
        )
        for k, stage, accumulate, tile in ways
    ]


@pytest.mark.parametrize("case", GRID, ids=str)
def test_layout_trains_like_one_process(pools: Pools, case: Case) -> None:
    check(pools, stepped(case), 1e-6)


@pytest.mark.parametrize("case", [case for case in GRID if case.world == 4], ids=str)
def test_layout_trains_like_one_process_under_adam(pools: Pools, case: Case) -> None:
    check(pools, [replace(case, optimizer="adam")], 1e-6)


@pytest.mark.parametrize("case", [case for case in GRID if case.world == 4 and case.order == "data_first"], ids=str)
def test_layout_trains_like_one_process_in_double_precision(pools: Pools, case: Case) -> None:
    # Leaves no room for an error that hides in rounding.
    check(pools, [replace(case, dtype=torch.float64, zero_stage=stage, tile_size=77) for stage in (1, 2)], 1e-13)


VARIANTS = {
    "gelu": TinyConfig(activation="gelu"),
    "relu without bias": TinyConfig(activation="relu", bias=False),
    "sigmoid": TinyConfig(score="sigmoid"),
    "vocabulary parallel": TinyConfig(vocab_parallel=True),
    "vocabulary parallel, tied": TinyConfig(vocab_parallel=True, tied=True),
    "tied": TinyConfig(tied=True),
    "packed": TinyConfig(packed=True),
    "experts without rows": TinyConfig(experts=16, top_k=1),
    "grouped GEMM impossible": TinyConfig(hidden=12),
}


@pytest.mark.parametrize("mode", ["dtd", "undropped", "sequence"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_trains_like_one_process(pools: Pools, variant: str, mode: str) -> None:
    config = VARIANTS[variant]
    check(pools, [Case(4, 2, 2, etp, mode=mode, config=config, dtype=torch.float64) for etp in (1, 2)], 1e-12)


@pytest.mark.parametrize("mode", ["dtd", "undropped"])
def test_block_that_is_used_twice_trains_like_one_process(pools: Pools, mode: str) -> None:
    config = TinyConfig(shared=True)
    check(pools, [Case(4, 2, 2, etp, mode=mode, config=config, dtype=torch.float64) for etp in (1, 2)], 1e-12)


@pytest.mark.parametrize("mode", ["dtd", "undropped", "sequence"])
@pytest.mark.parametrize("factor", [0.4, 1.0, 9.0])
def test_capacity_drops_the_same_assignments_on_every_tensor_layout(pools: Pools, factor: float, mode: str) -> None:
    # One data rank: the pool of a capacity is a data rank's micro-batch.
    config = TinyConfig(capacity_factor=factor, top_k=2)
    check(
        pools,
        [Case(2, 2, ep, etp, mode=mode, config=config, dtype=torch.float64) for ep, etp in ((1, 2), (2, 1))],
        1e-12,
    )
