"""Weights, memory and state of optimizers whose steps are shared out over ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_ted.errors import UnsupportedError
from lightning_ted.mesh import TEDMesh
from lightning_ted.optim.shared_bucket import SharedBucket
from lightning_ted.topology import Topology
from tests.support.pool import Pools
from tests.support.stepping import (
    ELEMENTWISE,
    SHAPES,
    backward,
    make_training,
    mesh_of_world,
    twin_of,
    two_groups,
)

stages = pytest.mark.parametrize("stage", [1, 2])
worlds = pytest.mark.parametrize("world", [2, 4])


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------


def _working_weights(dtype: torch.dtype, stage: int, wide: bool) -> list[dict[str, Tensor]]:
    """The masters of all elements and the working weights, after each of some steps."""
    twin = twin_of(stage, dtype=torch.float32, working=dtype, wide=wide)
    assert all(parameter.dtype == dtype for parameter in twin.ours.values())
    kept = []
    for step in range(3):
        twin.train(1, seed=step)
        masters = {name: twin.share.gather_master(parameter) for name, parameter in twin.ours.items()}
        for name, parameter in twin.ours.items():
            master = masters[name]
            assert master is not None and master.dtype == torch.float32
            assert torch.equal(parameter.detach(), master.to(dtype)), name
        kept.append({name: parameter.detach().clone() for name, parameter in twin.ours.items()})
    assert twin.error() < 0.05
    twin.training.close()
    return kept


@worlds
@stages
@pytest.mark.parametrize("wide", [False, True])
def test_working_weights_are_the_rounded_masters_on_every_rank(
    pools: Pools, world: int, stage: int, wide: bool
) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        ranks = pools(world).run(_working_weights, dtype, stage, wide)
        for rank in ranks:
            for ours, first in zip(rank, ranks[0], strict=True):
                assert all(torch.equal(ours[name], first[name]) for name in first)
        _working_weights(dtype, stage, wide)


def _released(stage: int) -> list[dict[str, Tensor]]:
    """Weights of a run that was interrupted by a release, and of one that was not."""
    results = []
    for interrupted in (True, False):
        twin = twin_of(stage, dtype=torch.float32, working=torch.bfloat16)
        twin.train(2)
        if interrupted:
            masters = {name: twin.share.gather_master(parameter) for name, parameter in twin.ours.items()}
            twin.training.release()
            for name, parameter in twin.ours.items():
                assert parameter.dtype == torch.float32 and torch.equal(parameter.detach(), masters[name])  # type: ignore[arg-type]
            twin.training.release()
            twin.training.acquire()
            twin.training.acquire()
            assert all(parameter.dtype == torch.bfloat16 for parameter in twin.ours.values())
        twin.train(2, seed=1)
        twin.training.release()
        results.append({name: parameter.detach().clone() for name, parameter in twin.ours.items()})
        twin.training.close()
    return results


@stages
def test_released_weights_are_the_masters_and_training_goes_on_bit_for_bit(pools: Pools, stage: int) -> None:
    for ours, uninterrupted in [*pools(2).run(_released, stage), _released(stage)]:
        assert all(torch.equal(ours[name], uninterrupted[name]) for name in ours)


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def _held(stage: int, name: str, tile_size: int) -> dict[str, int]:
    """Elements that this rank holds state for, and bytes of gradients after a pass."""
    kind, settings = ELEMENTWISE[name]
    twin = twin_of(stage, lambda ps: kind(ps.values(), **settings), tile_size=tile_size)
    full = sum(parameter.numel() for parameter in twin.ours.values())
    of_elements = {"Adam": 2, "Adagrad": 1}[name]
    before = sum(v.numel() for entries in twin.optimizer.state.values() for v in entries.values() if v.dim())
    twin.backward(0)
    kept = {
        id(p.grad.untyped_storage()): p.grad.untyped_storage().nbytes()
        for p in twin.ours.values()
        if p.grad is not None
    }
    buckets = {id(segment.bucket): segment.bucket for segment in twin.share.segments}
    for bucket in buckets.values():
        assert isinstance(bucket, SharedBucket)
        for value in (value for value in vars(bucket).values() if isinstance(value, Tensor)):
            if value is not bucket._weights:
                kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    shards = sum(bucket.placement.shards[bucket.axis.rank] for bucket in buckets.values())
    twin.step()
    # Of the number without dimension, too.
    state = sum(v.numel() for entries in twin.optimizer.state.values() for k, v in entries.items() if k != "step")
    twin.training.close()
    return {
        "full": full,
        "before": before,
        "state": state // of_elements,
        "owned": sum(twin.share.owned_elements().values()),
        "gradients": sum(kept.values()),
        "shards": shards,
    }


@pytest.mark.parametrize("name", ["Adam", "Adagrad"])
def test_state_is_held_once_and_in_equal_shares(pools: Pools, name: str) -> None:
    ranks = pools(4).run(_held, 1, name, 64)
    assert sum(rank["state"] for rank in ranks) == sum(rank["owned"] for rank in ranks) == ranks[0]["full"]
    assert all(rank["state"] == rank["owned"] for rank in ranks)
    # Adagrad has its sums before the first step.
    assert sum(rank["before"] for rank in ranks) == (ranks[0]["full"] - 1 if name == "Adagrad" else 0)
    # Padding aside, which all of it may lie in the last shard.
    assert max(rank["owned"] for rank in ranks) - min(rank["owned"] for rank in ranks) <= 32 * len(SHAPES) + 64


def test_stage_two_keeps_the_gradients_of_the_shard_only(pools: Pools) -> None:
    for rank in pools(4).run(_held, 2, "Adam", 64):
        assert rank["gradients"] == 8 * rank["shards"]


# ---------------------------------------------------------------------------------------------------------------------
# State, and optimizers that have to see whole parameters
# ---------------------------------------------------------------------------------------------------------------------


def _muon(parameters: dict[str, Parameter]) -> Optimizer:
    return torch.optim.Muon(parameters.values(), lr=0.01)


def _adafactor(parameters: dict[str, Parameter]) -> Optimizer:
    return torch.optim.Adafactor(parameters.values(), lr=0.01)


def _whole(stage: int) -> dict[str, float]:
    errors = {}
    for make, shapes, dtype in (
        (_muon, [(8, 4), (5, 7), (33, 2), (1, 1)], torch.float32),
        (_adafactor, [(8, 4), (5,), (), (33, 2), (1, 1)], torch.float64),
    ):
        twin = twin_of(stage, make, shapes=shapes, dtype=dtype, whole=True)
        twin.train(3, accumulate=2)
        second = twin_of(stage, make, shapes=shapes, dtype=dtype, whole=True)
        second.train(1, seed=3)
        second.optimizer.load_state_dict(twin.optimizer.state_dict())
        second.oracle.load_state_dict(twin.oracle.state_dict())
        second.train(2, seed=4)
        errors[make.__name__] = max(twin.error(), second.error())
    return errors


@stages
def test_optimizers_of_whole_parameters_step_as_on_one_process(pools: Pools, stage: int) -> None:
    for errors in [*pools(2).run(_whole, stage), *pools(4).run(_whole, stage), _whole(stage)]:
        assert errors["_muon"] < 1e-6 and errors["_adafactor"] < 1e-12


def _loaded(name: str) -> dict[str, float]:
    kind, settings = ELEMENTWISE[name]

    def make(parameters: dict[str, Parameter]) -> Optimizer:
        return kind(two_groups(parameters, settings), **settings)

    first = twin_of(make=make, dtype=torch.float32)
    first.train(2)
    errors = {}
    for what, state in (("owned", first.optimizer.state_dict()), ("whole", first.oracle.state_dict())):
        second = twin_of(make=make, dtype=torch.float32, tile_size=96)
        second.optimizer.load_state_dict(state)
        second.oracle.load_state_dict(first.oracle.state_dict())
        held = sum(v.numel() for entries in second.optimizer.state.values() for v in entries.values() if v.dim())
        assert held == sum(v.numel() for e in first.optimizer.state.values() for v in e.values() if v.dim())
        second.train(3, seed=1)
        errors[what] = second.error()
    return errors


def test_owned_and_whole_state_is_taken_over(pools: Pools) -> None:
    for name in ("Adam", "Adagrad", "ASGD", "Lion"):
        for errors in pools(4).run(_loaded, name):
            assert max(errors.values()) < 1e-6


def _uneven_wholes() -> tuple[float, list[int]]:
    """Of three matrices on two ranks, one is larger than the others together."""
    kind = torch.optim.Adafactor
    twin = twin_of(1, lambda p: kind(p.values(), lr=0.1), shapes=[(40, 50), (3, 5), (4, 7)], whole=True)
    twin.train(3)
    (bucket,) = {bucket for bucket, _ in twin.share._places.values()}
    return twin.error(), bucket.placement.shards


def test_whole_parameters_take_no_more_memory_than_they_have_elements(pools: Pools) -> None:
    for error, shards in pools(2).run(_uneven_wholes):
        assert error < 1e-12
        assert shards == [2016, 32 + 32]


def _large_half_gradients() -> float:
    parameters = {"p": torch.nn.Parameter(torch.zeros(64, dtype=torch.float16))}
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    training = make_training(parameters, mesh_of_world(), [optimizer])
    backward(training, parameters, {"p": torch.full((64,), 40000.0)})
    gradient = training.full_gradient("p")
    assert gradient is not None
    return gradient.float().max().item()


@pytest.mark.parametrize("world", [2, 4])
def test_sums_of_fp16_gradients_may_be_larger_than_fp16_numbers(pools: Pools, world: int) -> None:
    assert pools(world).run(_large_half_gradients) == [40000.0] * world


def _norm_after_clipping_by_value() -> float:
    parameters = {"p": torch.nn.Parameter(torch.zeros(10))}  # the second rank owns nothing of it
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    training = make_training(parameters, TEDMesh(Topology(2)), [optimizer])
    backward(training, parameters, {"p": torch.full((10,), 3.0)})
    assert training.grad_norm().item() == pytest.approx(3 * 10**0.5)
    optimizer.sharded.clip_by_value(1.0)  # type: ignore[attr-defined]
    return training.grad_norm().item()


def test_norm_is_taken_again_on_all_ranks_after_clipping_by_value(pools: Pools) -> None:
    assert pools(2).run(_norm_after_clipping_by_value) == [pytest.approx(10**0.5)] * 2


def _norm_while_accumulating() -> str:
    parameters = {"p": torch.nn.Parameter(torch.zeros(10))}
    training = make_training(parameters, TEDMesh(Topology(2)), [torch.optim.SGD(parameters.values(), lr=1.0)])
    backward(training, parameters, {"p": torch.ones(10)}, last=False)
    messages = []
    for ask in (training.grad_norm, lambda: training.full_gradient("p")):
        try:
            ask()
        except UnsupportedError as error:
            messages.append(str(error))
    return " ".join(messages)


def test_norm_of_gradients_that_accumulate_is_refused(pools: Pools) -> None:
    for message in pools(2).run(_norm_while_accumulating):
        assert "The norm is known once" in message and "The gradient of 'p' is known once" in message
        assert "on_before_optimizer_step" in message
