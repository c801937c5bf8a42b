from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_ted.optim.elementwise import is_elementwise

ELEMENTWISE = ["Adam", "AdamW", "SGD", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adamax", "Adadelta", "ASGD", "Rprop"]


def parameters() -> list[Parameter]:
    return [Parameter(torch.ones(2, 3)), Parameter(torch.ones(3))]


class ByNorm(torch.optim.SGD):
    """Divides each gradient by its norm, as LARS does."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.div_(parameter.grad.norm())
        return super().step(closure)


class ByGlobalNorm(torch.optim.SGD):
    """Divides all gradients by their common norm: alike in halves of one process, not on ranks of their own."""

    def step(self, closure: Any = None) -> Any:
        grads = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        torch._foreach_div_(grads, torch.nn.utils.get_total_norm(grads))
        return super().step(closure)


class Odd(torch.optim.SGD):
    def __init__(self, params: Any, secret: object) -> None:
        super().__init__(params, lr=0.1)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_torchs_elementwise_optimizers_are_told(name: str) -> None:
    assert is_elementwise(getattr(torch.optim, name)(parameters(), lr=0.1)) is True


@pytest.mark.parametrize(
    "settings",
    [{"amsgrad": True}, {"maximize": True, "weight_decay": 0.1}, {"foreach": True}, {"fused": True}],
    ids=str,
)
def test_settings_are_those_of_the_optimizer(settings: dict[str, Any]) -> None:
    assert is_elementwise(torch.optim.AdamW(parameters(), **settings)) is True


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.Adafactor(parameters()),
        torch.optim.Muon([Parameter(torch.ones(2, 3))]),
        ByNorm(parameters(), lr=0.1),
        ByGlobalNorm(parameters(), lr=0.1),
    ],
    ids=lambda optimizer: type(optimizer).__name__,
)
def test_optimizers_that_mix_elements_are_told(optimizer: Optimizer) -> None:
    assert is_elementwise(optimizer) is False


def test_a_class_that_cannot_be_tried_is_left_open() -> None:
    assert is_elementwise(Odd(parameters(), secret=object())) is None
    assert is_elementwise(torch.optim.LBFGS(parameters())) is None


def test_trying_changes_nothing() -> None:
    optimizer = torch.optim.Adam(parameters(), lr=torch.tensor(0.1))
    before = torch.get_rng_state()
    assert is_elementwise(optimizer) is True
    assert torch.equal(torch.get_rng_state(), before)
    assert not optimizer.state and torch.equal(optimizer.param_groups[0]["params"][0], torch.ones(2, 3))
