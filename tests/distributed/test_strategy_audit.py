"""Replicated parameters whose gradients differ on tensor ranks are found, when their gradients tell, and cheaply."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_ted.collectives.recorder import CommRecorder
from lightning_ted.errors import PlanError
from lightning_ted.layout import ParamLayout
from lightning_ted.mesh import TEDMesh
from lightning_ted.optim import audit
from lightning_ted.strategy.partition import PartitionOptions, partition_module
from lightning_ted.strategy.training import Training
from lightning_ted.topology import Topology
from tests.support.models import TinyConfig, TinyDecoder
from tests.support.pool import Pools
from tests.support.reduced import training_of

SIZES = {"tiny": (3,), "odd": (5, 13), "exact": (64,), "large": (97, 131), "empty": (0, 4)}


def _zero_initialised() -> tuple[int, str]:
    """ReZero and muP start the output projections at zero, so nothing before them has a gradient in the first step."""
    torch.manual_seed(8)
    model = TinyDecoder(TinyConfig())
    model.tp_plan = {name: style for name, style in model.tp_plan.items() if "_norm" not in name}
    for block in model.blocks:
        nn.init.zeros_(block.attention.o_proj.weight)
    mesh = TEDMesh(Topology(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training = training_of(model, mesh, partition_module(model, mesh, PartitionOptions()), optimizer)
    for step in range(3):
        optimizer.zero_grad()
        try:
            with training.backward():
                model.step(torch.arange(16).view(2, 8) % 24)[1].backward()
        except PlanError as error:
            return step, str(error)
        optimizer.step()
    return -1, ""


def test_a_gradient_that_is_zero_at_first_is_looked_at_again(pools: Pools) -> None:
    for step, message in pools(2).run(_zero_initialised):
        assert step == 1 and "q_norm.weight" in message and "k_norm.weight" in message
        assert "norm1" not in message


def _training() -> tuple[nn.ParameterDict, Training, TEDMesh]:
    module = nn.ParameterDict({name: nn.Parameter(torch.zeros(size)) for name, size in SIZES.items()})
    mesh = TEDMesh(Topology(dist.get_world_size(), 2))
    return module, training_of(module, mesh, {n: ParamLayout(n, tuple(p.shape)) for n, p in module.items()}), mesh


def _pass(module: nn.ParameterDict, training: Training, gradients: dict[str, torch.Tensor]) -> None:
    """A backward pass that gives these gradients."""
    with training.backward():
        torch.stack([(module[name] * gradient).sum() for name, gradient in gradients.items()]).sum().backward()


def _reduce(make: str, scale: float) -> tuple[str, dict[Any, int], dict[Any, int]]:
    module, training, mesh = _training()
    torch.manual_seed(0)
    gradients = {name: torch.randn(parameter.shape) for name, parameter in module.items()}
    own = torch.randn(SIZES[make], generator=torch.Generator().manual_seed(dist.get_rank()))
    # Below a millionth: zero but for rounding, which differs.
    gradients[make] = scale * own + (0 if scale < 1e-5 else gradients[make])
    with mesh.recording(CommRecorder()) as recorder:
        try:
            _pass(module, training, gradients)
        except PlanError as error:
            return str(error).partition("They")[0], dict(recorder.calls), dict(recorder.bytes)
    return "", dict(recorder.calls), dict(recorder.bytes)


@pytest.mark.parametrize("name", [name for name in SIZES if name != "empty"])
def test_a_different_gradient_is_named(pools: Pools, name: str) -> None:
    for message, calls, sent in pools(2).run(_reduce, name, 0.1):
        assert message.endswith(f"different gradients on them: {name}. ")
        # One comparison of a few numbers for all parameters, and one decision.
        assert calls == {("all_reduce", "tensor"): 1, ("all_reduce", "world"): 1}
        assert sum(sent.values()) < 8 * 2 * 65 * len(SIZES) + 200


@pytest.mark.parametrize("scale", [1e-7, 1e-6])
def test_rounding_is_no_difference(pools: Pools, scale: float) -> None:
    assert [message for message, *_ in pools(2).run(_reduce, "large", scale)] == [""] * 2


def _looks_by_step(steps: int) -> list[int]:
    module, training, _ = _training()
    found = []
    for _ in range(steps):
        with mock.patch.object(audit, "_signature", wraps=audit._signature) as look:
            _pass(module, training, {name: torch.ones_like(p) for name, p in module.items() if name != "tiny"})
        found.append(look.call_count)
    return found


def test_the_gradient_of_a_parameter_is_looked_at_until_it_tells(pools: Pools) -> None:
    # The empty one never tells.
    assert pools(2).run(_looks_by_step, 3) == [[len(SIZES) - 1, 1, 1]] * 2


def _calls_by_step(steps: int) -> list[int]:
    module, training, mesh = _training()
    found = []
    for _ in range(steps):
        with mesh.recording(CommRecorder()) as recorder:
            _pass(module, training, {name: torch.ones_like(p) for name, p in module.items() if name != "tiny"})
        found.append(recorder.calls[("all_reduce", "world")])
    return found


def test_a_parameter_without_gradients_is_given_up(pools: Pools) -> None:
    assert pools(2).run(_calls_by_step, 20) == [[1] * 16 + [0] * 4] * 2
