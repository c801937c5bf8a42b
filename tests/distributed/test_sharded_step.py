"""Optimizers whose steps are shared out over ranks, against torch's own on one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from tests.support.pool import Pools
from tests.support.stepping import (
    ELEMENTWISE,
    SHAPES,
    Twin,
    adamw,
    gradients,
    make_parameters,
    mesh_of_world,
    twin_of,
    two_groups,
)

stages = pytest.mark.parametrize("stage", [1, 2])
worlds = pytest.mark.parametrize("world", [2, 4])


def _elementwise_errors(stage: int) -> dict[str, float]:
    errors = {}
    mesh = mesh_of_world()
    for name, (kind, settings) in ELEMENTWISE.items():
        for accumulate in (1, 3):

            def make(parameters: dict[str, Parameter]) -> Optimizer:
                return kind(two_groups(parameters, settings), **settings)  # noqa: B023 - called at once

            twin = Twin(mesh, make, SHAPES, zero_stage=stage, tile_size=64)
            twin.train(3, accumulate=accumulate)
            twin.training.close()
            errors[f"{name}, {accumulate} passes"] = twin.error()
    return errors


@worlds
@stages
def test_every_class_steps_as_torchs_own_on_one_process(pools: Pools, world: int, stage: int) -> None:
    for errors in pools(world).run(_elementwise_errors, stage):
        assert len(errors) == 2 * len(ELEMENTWISE)
        assert not {case: error for case, error in errors.items() if not error < 1e-12}


# ---------------------------------------------------------------------------------------------------------------------
# What users do to an optimizer in mid-run
# ---------------------------------------------------------------------------------------------------------------------


def _rate_changes(stage: int) -> Twin:
    twin = twin_of(stage)
    for step in range(3):
        twin.train(1, seed=step)
        twin.each(lambda optimizer, _: [group.update(lr=group["lr"] * 0.5) for group in optimizer.param_groups])
    return twin


def _weight_decay_changes(stage: int) -> Twin:
    twin = twin_of(stage)
    twin.train(1)
    twin.each(lambda optimizer, _: optimizer.param_groups[1].update(weight_decay=0.5, betas=(0.5, 0.5)))
    twin.train(2, seed=1)
    return twin


def _scheduled(stage: int) -> Twin:
    twin = twin_of(stage)
    schedulers: list[LambdaLR] = []
    twin.each(lambda optimizer, _: schedulers.append(LambdaLR(optimizer, lambda step: 0.5**step)))
    for step in range(3):
        twin.train(1, seed=step)
        for scheduler in schedulers:
            scheduler.step()
    return twin


def _group_is_added(stage: int) -> Twin:
    twin = twin_of(stage, lambda ps: torch.optim.AdamW(list(ps.values())[:3], lr=0.01))
    twin.train(2, without=lambda rank: ["p3", "p4", "p5", "p6"])
    twin.each(lambda optimizer, ps: optimizer.add_param_group({"params": list(ps.values())[3:], "lr": 0.1}))
    twin.train(3, seed=1)
    return twin


def _groups_are_assigned(stage: int) -> Twin:
    twin = twin_of(stage)
    twin.train(2)

    def assign(optimizer: Optimizer, _: dict[str, Parameter]) -> None:
        optimizer.param_groups = [{**group, "lr": 0.1} for group in reversed(optimizer.param_groups)]

    twin.each(assign)
    twin.train(2, seed=1)
    return twin


def _parameter_leaves(stage: int) -> Twin:
    twin = twin_of(stage)
    twin.train(1)
    twin.each(lambda optimizer, _: optimizer.param_groups[0]["params"].pop(2))
    twin.train(2, seed=1)
    return twin


def _requires_grad(optimizer: Optimizer, names: list[str], parameters: dict[str, Parameter], on: bool) -> None:
    for name in names:
        parameters[name].requires_grad_(on)


def _frozen_then_unfrozen(stage: int) -> Twin:
    twin = twin_of(stage, lambda ps: (ps["p4"].requires_grad_(False), ps["p1"].requires_grad_(False), adamw(ps))[-1])
    twin.train(2)
    twin.each(lambda optimizer, ps: _requires_grad(optimizer, ["p4", "p1"], ps, True))
    twin.train(2, seed=1)
    return twin


def _frozen_for_a_while(stage: int) -> Twin:
    twin = twin_of(stage)
    twin.train(2)
    twin.each(lambda optimizer, ps: _requires_grad(optimizer, ["p4", "p0", "p5"], ps, False))
    twin.train(2, seed=1)
    twin.each(lambda optimizer, ps: _requires_grad(optimizer, ["p4", "p0", "p5"], ps, True))
    twin.train(2, seed=2)
    return twin


def _all_frozen_for_a_while(stage: int) -> Twin:
    twin = twin_of(stage)
    twin.train(2)
    twin.each(lambda optimizer, ps: _requires_grad(optimizer, list(ps), ps, False))
    twin.train(1, seed=1)
    twin.each(lambda optimizer, ps: _requires_grad(optimizer, list(ps), ps, True))
    twin.train(1, seed=2)
    return twin


def _unused_everywhere(stage: int) -> Twin:
    twin = twin_of(stage)
    twin.train(3, without=lambda rank: ["p3", "p6"])
    assert not torch.any(twin.ours["p3"] != make_parameters(SHAPES)["p3"])
    held = {id(segment.parameter) for segment in twin.share.segments if segment.master in twin.optimizer.state}
    assert held.isdisjoint({id(twin.ours["p3"]), id(twin.ours["p6"])})
    twin.train(2, seed=1)
    return twin


def _nothing_used(stage: int) -> Twin:
    twin = twin_of(stage)
    twin.train(2, without=lambda rank: list(twin.ours))
    assert not twin.optimizer.state
    twin.train(1, seed=1)
    return twin


def _unused_on_one_rank(stage: int) -> Twin:
    twin = twin_of(stage)
    twin.train(2, without=lambda rank: ["p3", "p4"] if rank else [])
    twin.train(2, seed=1, without=lambda rank: [] if rank else ["p0", "p4", "p6"])
    return twin


def _used_by_turns(stage: int) -> Twin:
    twin = twin_of(stage)
    for step in range(4):
        twin.train(1, seed=step, accumulate=2, without=lambda rank, s=step: ["p3"] if s % 2 else ["p4"])  # type: ignore[misc]
    return twin


def _gradient_is_taken_away(stage: int) -> Twin:
    twin = twin_of(stage)
    twin.train(1)
    twin.zero_grad()
    twin.backward(7)
    if stage == 1:
        twin.each(lambda _, ps: [setattr(ps[name], "grad", None) for name in ("p3", "p4")])
    twin.step()
    twin.train(1, seed=1)
    return twin


def _gradient_is_edited(stage: int) -> Twin:
    twin = twin_of(stage)
    twin.train(1)
    twin.zero_grad()
    twin.backward(7)
    if stage == 1:
        twin.each(lambda _, ps: [p.grad.mul_(2).add_(1) for p in ps.values()])  # type: ignore[union-attr]
    twin.step()
    return twin


def _gradient_is_replaced(stage: int) -> Twin:
    twin = twin_of(stage)
    twin.train(1)
    twin.zero_grad()
    twin.backward(7)
    if stage == 1:
        # Each rank has the right gradient in its own slice only, which is all that it steps.
        twin.each(lambda _, ps: [setattr(p, "grad", (p.grad * 2).mT.contiguous().mT) for p in _matrices(ps)])
    twin.step()
    twin.train(1, seed=2)
    return twin


def _matrices(parameters: dict[str, Parameter]) -> list[Any]:
    return [parameter for parameter in parameters.values() if parameter.dim() > 1]


def _gradient_is_made_by_hand(stage: int) -> Twin:
    twin = twin_of(stage)
    twin.train(1)
    twin.zero_grad()
    made = gradients(twin.theirs, 5)
    twin.each(lambda _, ps: [setattr(ps[name], "grad", made[name]) for name in ("p3", "p4", "p5")])
    twin.step()
    return twin


def _gradients_are_zeroed_in_place(stage: int) -> Twin:
    # Without weight decay and moments, so that a step by zeros is none: stage 2 holds none after a step.
    twin = twin_of(stage, lambda ps: torch.optim.SGD(ps.values(), lr=0.1))
    for step in range(4):
        twin.zero_grad(set_to_none=False)
        for index in range(2):
            twin.backward(10 * step + index, index == 1, without=lambda rank, s=step: [f"p{s}"])  # type: ignore[misc]
        twin.step()
    return twin


def _gradients_zeroed_between_passes(stage: int) -> Twin:
    twin = twin_of(stage)
    for set_to_none in (True, False):
        twin.zero_grad()
        twin.backward(1)
        twin.zero_grad(set_to_none=set_to_none)
        twin.backward(2)
        twin.step()
    return twin


def _stepped_twice(stage: int) -> Twin:
    twin = twin_of(stage)
    twin.train(1)
    if stage == 1:  # stage 2 has freed the gradients
        twin.step()
    return twin


def _weights_are_replaced(stage: int) -> Twin:
    twin = twin_of(stage)
    twin.train(2)

    def replace(_: Optimizer, parameters: dict[str, Parameter]) -> None:
        parameters["p4"].data = (parameters["p4"].data * 2).t().contiguous().t()
        parameters["p5"].data = parameters["p5"].data + 1

    twin.each(replace)
    twin.train(2, seed=1)
    twin.each(lambda _, ps: ps["p6"].data.mul_(2))
    twin.train(1, seed=2)
    return twin


def _graph_is_kept(stage: int) -> Twin:
    twin = twin_of(stage)
    twin.train(2, create_graph=True)
    twin.train(1, seed=1, accumulate=3, create_graph=True)
    assert all(p.grad is None or not p.grad.requires_grad for p in twin.ours.values())
    return twin


def _passes_add_up(stage: int) -> Twin:
    twin = twin_of(stage)
    for step in range(2):
        twin.zero_grad()
        for index in range(3):
            twin.backward(10 * step + index, without=lambda rank, i=index: ["p3"] if i == rank else [f"p{i}"])  # type: ignore[misc]
        twin.step()
    return twin


def _passes_add_up_after_accumulation(stage: int) -> Twin:
    twin = twin_of(stage)
    for last in (True, False, True, False, False, True):
        twin.backward(int(last), last)
    twin.step()
    return twin


def _pass_is_broken_off(stage: int) -> Twin:
    twin = twin_of(stage)
    twin.train(3)
    for set_to_none in (True, False):
        twin.zero_grad(set_to_none=set_to_none)
        loss = sum((p * p).sum() for p in twin.ours.values())
        # The hook of the first that is used comes last: the gradients of the others are there, and on their way.
        handle = twin.ours["p0"].register_hook(_broken)
        with pytest.raises(ValueError, match="broken"), twin.training.backward():
            loss.backward()  # type: ignore[union-attr]
        handle.remove()
        twin.zero_grad(set_to_none=set_to_none)
        twin.backward(5)
        twin.step()
    return twin


def _broken(_: Tensor) -> None:
    raise ValueError("broken")


SCENARIOS = [
    _rate_changes,
    _weight_decay_changes,
    _scheduled,
    _group_is_added,
    _groups_are_assigned,
    _parameter_leaves,
    _frozen_then_unfrozen,
    _frozen_for_a_while,
    _all_frozen_for_a_while,
    _unused_everywhere,
    _nothing_used,
    _unused_on_one_rank,
    _used_by_turns,
    _gradient_is_taken_away,
    _gradient_is_edited,
    _gradient_is_replaced,
    _gradient_is_made_by_hand,
    _gradients_are_zeroed_in_place,
    _gradients_zeroed_between_passes,
    _stepped_twice,
    _weights_are_replaced,
    _graph_is_kept,
    _passes_add_up,
    _passes_add_up_after_accumulation,
    _pass_is_broken_off,
]


def _played(name: str, bucket_size: int) -> list[tuple[float, list[Tensor]]]:
    scenario = next(scenario for scenario in SCENARIOS if scenario.__name__ == name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_ted.optim.reducer.BUCKET_SIZE", bucket_size)
        results = []
        for stage in (1, 2):
            twin = scenario(stage)
            twin.training.close()
            results.append((twin.error(), [parameter.detach() for parameter in twin.ours.values()]))
        return results


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_what_users_do_in_mid_run_is_followed(pools: Pools, scenario: str) -> None:
    for world, bucket_size in ((2, 30), (4, 2**23)):
        ranks = pools(world).run(_played, scenario, bucket_size)
        for stage in (0, 1):
            assert all(rank[stage][0] < 1e-12 for rank in ranks), (world, stage + 1, [rank[stage][0] for rank in ranks])
            for rank in ranks:
                assert all(map(torch.equal, rank[stage][1], ranks[0][stage][1]))
    assert all(error < 1e-12 for error, _ in _played(scenario, 30))


def _many_buckets() -> float:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_ted.optim.reducer.BUCKET_SIZE", 1)
        twin = twin_of(stage=2, shapes=[(10,)] * 9)  # more than are reduced at the same time
        twin.train(3)
        return twin.error()


def test_gradients_that_are_freed_before_backward_ends_are_stepped(pools: Pools) -> None:
    assert all(error < 1e-12 for error in pools(2).run(_many_buckets))
