"""The step on one rank, by each optimizer's own class: what a tile is must not show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from lightning_ted.mesh import TEDMesh
from lightning_ted.optim.sharded import ShardedOptimizer, unshard_optimizer
from lightning_ted.topology import Topology
from tests.support.stepping import ELEMENTWISE, Twin, backward, gradients, make_parameters, make_training, two_groups

SMALL: list[tuple[int, ...]] = [(1,), (3,), (0,), (11, 3), (), (2, 5)]
LARGE: list[tuple[int, ...]] = [(7,), (1000,), (3, 700), (1,)]


def _made(name: str, parameters: Mapping[str, Parameter], **more: Any) -> Optimizer:
    kind, settings = ELEMENTWISE[name]
    settings = {**settings, **more}
    return kind(two_groups(parameters, settings), **settings)


def _twin(name: str, shapes: list[tuple[int, ...]] = SMALL, **options: Any) -> Twin:
    return Twin(TEDMesh(Topology(1)), lambda parameters: _made(name, parameters), shapes, **options)


def _implementations(name: str) -> list[dict[str, Any]]:
    """Settings that choose each implementation that a class has."""
    kind, settings = ELEMENTWISE[name]
    defaults = kind([Parameter(torch.zeros(1))], **settings).defaults
    choices: list[dict[str, Any]] = [{}]
    if "foreach" in defaults:
        choices += [{"foreach": True}, {"foreach": False}]
    if "fused" in defaults and name != "Adagrad":
        choices += [{"fused": True}]
    return choices


def _stepped(
    name: str, shapes: list[tuple[int, ...]], tile_size: int | None, settings: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and state after five steps."""
    parameters = make_parameters(shapes, torch.float32)
    optimizer = _made(name, parameters, **settings)
    training = make_training(parameters, TEDMesh(Topology(1)), [optimizer], tile_size=tile_size)
    for step in range(5):
        optimizer.zero_grad()
        backward(training, parameters, gradients(parameters, step))
        optimizer.step()
    return {n: p.detach() for n, p in parameters.items()}, optimizer.state_dict()


def _assert_equal_state(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for index, entries in theirs["state"].items():
        assert ours["state"][index].keys() == entries.keys()
        for key, value in entries.items():
            torch.testing.assert_close(ours["state"][index][key], value, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_tiles_step_bit_for_bit_as_one_tile(name: str) -> None:
    for settings in _implementations(name):
        for shapes, tile_sizes in ((SMALL, (1, 7, 10**9)), (LARGE, (1000,))):
            whole, state = _stepped(name, shapes, None, settings)
            for tile_size in tile_sizes:
                cut, state_of_tiles = _stepped(name, shapes, tile_size, settings)
                assert all(torch.equal(cut[n], whole[n]) for n in whole), (settings, tile_size)
                _assert_equal_state(state_of_tiles, state)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_each_class_steps_as_torchs_own(name: str) -> None:
    twin = _twin(name, tile_size=40)
    twin.train(5)
    assert twin.error() < 1e-12
    assert [group["lr"] for group in twin.optimizer.param_groups] == [g["lr"] for g in twin.oracle.param_groups]


def test_the_object_keeps_its_identity() -> None:
    parameters = make_parameters(SMALL)
    optimizer = _made("AdamW", parameters)
    groups, lists = list(optimizer.param_groups), [group["params"] for group in optimizer.param_groups]
    keys = [list(group) for group in groups]
    training = make_training(parameters, TEDMesh(Topology(1)), [optimizer], tile_size=1)
    backward(training, parameters, gradients(parameters, 0))
    optimizer.step()
    assert isinstance(optimizer, torch.optim.AdamW) and isinstance(optimizer, ShardedOptimizer)
    assert type(optimizer).__name__ == "AdamW" and type(optimizer).__module__ == torch.optim.AdamW.__module__
    assert all(group is before for group, before in zip(optimizer.param_groups, groups, strict=True))
    assert all(group["params"] is before for group, before in zip(groups, lists, strict=True))
    assert [list(group) for group in groups] == keys
    assert [group["fused"] for group in groups] == [None, None]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("early", [True, False], ids=["made before", "made after"])
@pytest.mark.parametrize("kind", ["LambdaLR", "OneCycleLR"])
def test_schedulers_are_heard(kind: str, early: bool) -> None:
    def schedule(optimizer: Optimizer) -> Any:
        if kind == "LambdaLR":
            return LambdaLR(optimizer, [lambda step: 0.5**step, lambda step: 1.0 + step])
        return OneCycleLR(optimizer, max_lr=[0.1, 0.2], total_steps=20)

    schedulers: list[Any] = []

    def make(parameters: dict[str, Parameter]) -> Optimizer:
        optimizer = _made("Adam", parameters)
        if early:
            schedulers.append(schedule(optimizer))
        return optimizer

    twin = Twin(TEDMesh(Topology(1)), make, SMALL, tile_size=1)
    if not early:
        twin.each(lambda optimizer, _: schedulers.append(schedule(optimizer)))
    for step in range(4):
        twin.train(1, seed=step)
        for scheduler in schedulers:
            scheduler.step()
    assert twin.error() < 1e-12


def test_hooks_are_called_once_a_step() -> None:
    twin = _twin("Adam", tile_size=1)
    seen: list[str] = []
    twin.optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    twin.optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    twin.train(2)
    assert seen == ["before", "after"] * 2


def test_a_closure_is_called_with_gradients_enabled_and_its_loss_returned() -> None:
    twin = _twin("Adam", tile_size=7)

    def closure() -> str:
        assert torch.is_grad_enabled()
        twin.backward(0)
        return "loss"

    assert twin.optimizer.step(closure) == "loss"  # type: ignore[arg-type,comparison-overlap]
    twin.oracle.step()
    assert twin.error() < 1e-12


@pytest.mark.parametrize("tile_size", [None, 32])
def test_steps_are_counted_in_every_group_even_if_it_has_nothing_to_step(tile_size: int | None) -> None:
    twin = _twin("Counting", tile_size=tile_size)
    twin.train(3, without=lambda rank: ["p1", "p3", "p5"])
    assert [group["k"] for group in twin.optimizer.param_groups] == [3, 3]
    twin.train(3, seed=1)
    assert [group["k"] for group in twin.optimizer.param_groups] == [6, 6] and twin.error() < 1e-12


def test_numbers_keep_their_state_as_torch_does() -> None:
    twin = _twin("Adagrad")
    twin.train(2)
    state = twin.optimizer.state_dict()["state"]
    assert all(state[index]["sum"].numel() == entry["sum"].numel() for index, entry in state.items())
    assert sorted(entry["sum"].dim() for entry in state.values()) == [0, 1, 1, 1, 1]


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_state_goes_round(name: str) -> None:
    # In fp32, as torch turns all state into the parameters' dtype when it is loaded.
    first, second = (_twin(name, tile_size=size, dtype=torch.float32) for size in (40, 32))
    first.train(2)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    with torch.no_grad():
        for parameter_name, parameter in second.ours.items():
            parameter.copy_(first.ours[parameter_name])
            second.theirs[parameter_name].copy_(first.theirs[parameter_name])
    second.oracle.load_state_dict(first.oracle.state_dict())
    second.train(2, seed=1)
    assert second.error() < 1e-6


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_torchs_own_state_is_taken_over(name: str) -> None:
    first, second = (_twin(name, tile_size=size, dtype=torch.float32) for size in (None, 40))
    first.train(2)
    second.optimizer.load_state_dict(first.oracle.state_dict())
    second.oracle.load_state_dict(first.oracle.state_dict())
    second.train(3, seed=1)
    assert second.error() < 1e-6


def test_state_of_no_parameter_goes_round() -> None:
    first, second = _twin("Adam"), _twin("Adam")
    first.optimizer.state["rounds"] = 3  # type: ignore[index]
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert second.optimizer.state["rounds"] == 3  # type: ignore[index]


def test_weights_that_somebody_replaces_are_stepped() -> None:
    twin = _twin("Adam", tile_size=7)
    twin.train(2)

    def replace(_: Optimizer, parameters: dict[str, Parameter]) -> None:
        for parameter in parameters.values():
            parameter.data = parameter.data.mT.clone().mT if parameter.dim() > 1 else parameter.data * 2

    twin.each(replace)
    twin.train(2, seed=1)
    assert twin.error() < 1e-12


def test_weights_may_lie_in_any_order_of_memory() -> None:
    twin = _twin("Adam", [(2, 3, 4, 4)])
    twin.each(lambda _, ps: [setattr(p, "data", p.data.to(memory_format=torch.channels_last)) for p in ps.values()])
    twin.train(2)
    assert twin.error() < 1e-12


def test_complex_weights_are_stepped() -> None:
    ours, theirs = (Parameter(torch.ones(5, dtype=torch.complex128)) for _ in range(2))
    optimizer, oracle = torch.optim.Adam([ours], lr=0.1), torch.optim.Adam([theirs], lr=0.1)
    training = make_training({"p": ours}, TEDMesh(Topology(1)), [optimizer], tile_size=2)
    for step in range(2):
        grad = torch.randn(5, dtype=torch.complex128, generator=torch.Generator().manual_seed(step))
        with training.backward():
            (ours * grad.conj()).sum().real.backward()
        theirs.grad = ours.grad.clone()  # type: ignore[union-attr]
        optimizer.step()
        oracle.step()
        optimizer.zero_grad()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_parameter_whose_first_gradient_comes_later_steps_as_by_torch(name: str) -> None:
    twin = _twin(name, [(64,), (64,), (32,)])
    for step in range(3):
        twin.zero_grad()
        twin.backward(step, without=lambda _, step=step: ["p1"] if step == 0 else [])
        twin.step()
    assert twin.error() < 1e-12


def test_sgd_moves_16_bit_weights_as_torch_does() -> None:
    ours, theirs = (make_parameters([(64,)], torch.bfloat16) for _ in range(2))
    sharded, plain = (torch.optim.SGD(parameters.values(), lr=0.5) for parameters in (ours, theirs))
    training = make_training(ours, TEDMesh(Topology(1)), [sharded])
    backward(training, ours, gradients(ours, 0))
    theirs["p0"].grad = gradients(theirs, 0)["p0"].bfloat16()
    sharded.step()
    plain.step()
    assert torch.equal(ours["p0"], theirs["p0"])


def test_a_clipped_gradient_stays_clipped_when_another_is_added() -> None:
    parameters = {"p": Parameter(torch.zeros(2))}
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    training = make_training(parameters, TEDMesh(Topology(1)), [optimizer])
    backward(training, parameters, {"p": torch.tensor([10.0, 0.0])})
    optimizer.sharded.clip_by_norm(1.0)  # type: ignore[attr-defined]
    backward(training, parameters, {"p": torch.tensor([0.0, 1.0])})
    optimizer.step()
    torch.testing.assert_close(parameters["p"].detach(), torch.tensor([-1.0, -1.0]))


def test_the_factor_of_gradients_that_are_gone_is_gone() -> None:
    parameters = {"p": Parameter(torch.ones(1))}
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    training = make_training(parameters, TEDMesh(Topology(1)), [optimizer])
    share = optimizer.sharded  # type: ignore[attr-defined]
    backward(training, parameters, {"p": torch.tensor([float("inf")])})
    share.scale_gradients(torch.tensor(2.0**-16))
    parameters["p"].grad = None
    backward(training, parameters, {"p": torch.tensor([2.0**16])})
    share.scale_gradients(torch.tensor(2.0**-16))
    optimizer.step()
    assert parameters["p"].item() == 0.0


def test_an_optimizer_may_be_sharded_again() -> None:
    twin = _twin("AdamW")
    twin.train(2)
    twin.training.close()
    unshard_optimizer(twin.optimizer)
    assert type(twin.optimizer) is torch.optim.AdamW
    twin.training = make_training(twin.ours, twin.mesh, [twin.optimizer], tile_size=64)
    twin.train(2, seed=1)
    assert twin.error() < 1e-12


def test_gradients_get_the_dtype_of_this_run_and_not_of_the_one_before() -> None:
    parameters = make_parameters([(64,)], torch.float32)
    for wide in (True, False, True):
        optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
        training = make_training(
            parameters, TEDMesh(Topology(1)), [optimizer], working=torch.bfloat16, wide=wide, zero_stage=2
        )
        backward(training, parameters, gradients(parameters, 0))
        assert parameters["p0"].grad is not None
        assert parameters["p0"].grad.dtype == (torch.float32 if wide else torch.bfloat16)
        optimizer.step()
        assert parameters["p0"].grad is None
        training.release()
        training.close()
