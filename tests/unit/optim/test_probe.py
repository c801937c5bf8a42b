from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_ted.optim.probe import update_kind

ELEMENTWISE = ["Adam", "AdamW", "SGD", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adamax", "Adadelta", "ASGD", "Rprop"]


def parameters() -> list[Parameter]:
    return [Parameter(torch.ones(2, 3)), Parameter(torch.ones(3, 2))]


class ByNorm(torch.optim.SGD):
    """Scales each gradient by the norms of the parameter and the gradient, as LARS does, unless weight decay is zero."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"] if group["weight_decay"] else []:
                parameter.grad.mul_(0.001 * parameter.detach().norm() / parameter.grad.norm())
        return super().step(closure)


class ByGlobalNorm(torch.optim.SGD):
    """Divides all gradients by their common norm."""

    def step(self, closure: Any = None) -> Any:
        grads = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        torch._foreach_div_(grads, torch.nn.utils.get_total_norm(grads))
        return super().step(closure)


class Estimating(torch.optim.SGD):
    """Estimates a rate from all gradients, as D-Adaptation does, and in the first steps does not yet use it."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            squares = sum(float(parameter.grad.square().sum()) for parameter in group["params"])
            group["estimate"] = group.get("estimate", 0.0) + 1e-12 * squares
        return super().step(closure)


class LateNorm(torch.optim.SGD):
    """Gathers a norm of each parameter, and does not yet use it."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["norm"] = parameter.grad.norm()
        return super().step(closure)


class LateFactors(torch.optim.SGD):
    """Gathers a matrix as Shampoo does, which is of none of the elements."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                grad = parameter.grad.reshape(len(parameter), -1)
                self.state[parameter]["factor"] = grad @ grad.T
        return super().step(closure)


class Odd(torch.optim.SGD):
    """Its class takes other arguments than its settings, and needs what it was given."""

    def __init__(self, params: Any, secret: list[Tensor]) -> None:
        super().__init__(params, lr=0.1)
        self.secret = secret

    def step(self, closure: Any = None) -> Any:
        self.secret[0].add_(1)
        return super().step(closure)


class OddByNorm(ByNorm):
    def __init__(self, params: Any, secret: object) -> None:
        super().__init__(params, lr=0.1, weight_decay=0.1)


class ByFlag(ByNorm):
    """Keeps a setting on itself that its class does not show in the groups."""

    by_norm = False

    def step(self, closure: Any = None) -> Any:
        return super().step(closure) if self.by_norm else torch.optim.SGD.step(self, closure)


class Schedule(Optimizer):
    """Counts its steps in the group, and wants to be told that it trains, as schedule-free optimizers do."""

    def __init__(self, params: Any, lr: float = 0.1, k: int = 0) -> None:
        super().__init__(params, {"lr": lr, "k": k, "train_mode": False})

    def train(self) -> None:
        for group in self.param_groups:
            group["train_mode"] = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            assert group["train_mode"]
            group["k"] += 1
            for parameter in group["params"]:
                mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                mean.lerp_(parameter.grad, 0.1)
                parameter.sub_(mean, alpha=group["lr"] / (1 - 0.9 ** group["k"]))


class OwnCounter(torch.optim.SGD):
    """Counts its steps on itself, so that two calls are two steps."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.div_(self.steps)
        return super().step(closure)


class Wrapper(Optimizer):
    """Leaves the step to another optimizer, with parameters of its own."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__([p for group in inner.param_groups for p in group["params"]], {})
        self.inner = inner

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


class Talkative(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        warnings.warn("stepped", stacklevel=2)
        torch.rand(1)
        return super().step(closure)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_torchs_elementwise_optimizers_are_told(name: str) -> None:
    assert update_kind(getattr(torch.optim, name)(parameters(), lr=0.1)) == "elementwise"


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("AdamW", {"amsgrad": True}),
        ("AdamW", {"maximize": True, "weight_decay": 0.1}),
        ("AdamW", {"foreach": True}),
        ("AdamW", {"fused": True}),
        ("Adam", {"capturable": False}),
        ("Adagrad", {"initial_accumulator_value": 0.5}),
        ("SGD", {"momentum": 0.9, "nesterov": True}),
        ("RMSprop", {"centered": True, "momentum": 0.9}),
    ],
    ids=str,
)
def test_settings_are_those_of_the_optimizer(name: str, settings: dict[str, Any]) -> None:
    assert update_kind(getattr(torch.optim, name)(parameters(), **settings)) == "elementwise"


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.Adafactor(parameters()),
        torch.optim.Muon(parameters()),
        ByNorm(parameters(), lr=0.1, weight_decay=0.1),
        OddByNorm(parameters(), secret=object()),
        LateNorm(parameters()),
        LateFactors(parameters()),
    ],
    ids=lambda optimizer: type(optimizer).__name__,
)
def test_optimizers_that_mix_a_parameters_elements_are_told(optimizer: Optimizer) -> None:
    assert update_kind(optimizer) == "parameterwise"


@pytest.mark.parametrize("kind", [ByGlobalNorm, Estimating, OwnCounter])
def test_optimizers_that_mix_parameters_are_told(kind: type[torch.optim.SGD]) -> None:
    assert update_kind(kind(parameters(), lr=0.1)) == "coupled"


def test_what_cannot_be_tried_is_unknown() -> None:
    assert update_kind(torch.optim.LBFGS(parameters())) == "unknown"
    assert update_kind(torch.optim.SparseAdam(parameters())) == "unknown"


def test_a_class_that_takes_other_arguments_is_copied() -> None:
    secret = [torch.zeros(())]
    assert update_kind(Odd(parameters(), secret)) == "elementwise"
    assert secret[0] == 0


def test_steps_counted_in_the_group_are_no_coupling() -> None:
    assert update_kind(Schedule(parameters())) == "elementwise"


def test_settings_outside_of_the_groups_count() -> None:
    optimizer = ByFlag(parameters(), lr=0.1, weight_decay=0.1)
    assert update_kind(optimizer) == "elementwise"
    optimizer.by_norm = True
    assert update_kind(optimizer) == "parameterwise"


def test_groups_are_tried_that_are_stepped_in_another_manner() -> None:
    first, second = parameters()
    groups = [{"params": [first], "weight_decay": 0.0}, {"params": [second], "weight_decay": 0.1}]
    assert update_kind(ByNorm(groups, lr=0.1)) == "parameterwise"


def test_a_rate_of_zero_hides_nothing() -> None:
    assert update_kind(ByNorm(parameters(), lr=0.0, weight_decay=0.1)) == "parameterwise"
    assert update_kind(torch.optim.Adam(parameters(), lr=torch.tensor(0.0))) == "elementwise"


def test_a_wrapper_steps_nothing_of_the_user() -> None:
    inner = torch.optim.SGD(parameters(), lr=0.1)
    for parameter in inner.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    assert update_kind(Wrapper(inner)) == "unknown"
    assert all(torch.equal(p, torch.ones_like(p)) for p in inner.param_groups[0]["params"])


def test_a_scheduler_and_hooks_are_left_alone() -> None:
    optimizer = Odd(parameters(), [torch.zeros(())])
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    optimizer.register_step_pre_hook(lambda *_: pytest.fail("the hook was called"))
    assert update_kind(optimizer) == "elementwise"
    assert optimizer.param_groups[0]["lr"] == 0.0


@pytest.mark.filterwarnings("error")
def test_trying_changes_nothing() -> None:
    optimizer = Talkative(parameters(), lr=torch.tensor(0.1), momentum=0.9)
    settings = copy.deepcopy([{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups])
    before = torch.get_rng_state()
    assert update_kind(optimizer) == "elementwise"
    assert torch.equal(torch.get_rng_state(), before)
    assert not optimizer.state and torch.equal(optimizer.param_groups[0]["params"][0], torch.ones(2, 3))
    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == settings


def test_it_stays_on_the_cpu() -> None:
    optimizer = torch.optim.AdamW(parameters())
    with torch.device("meta"):
        assert update_kind(optimizer) == "elementwise"


class OnLargeOnes(torch.optim.SGD):
    """Centres the gradients of large matrices."""

    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad.dim() > 1 and parameter.shape[-1] >= 128:
                parameter.grad.sub_(parameter.grad.mean(-1, keepdim=True))
        return super().step(closure)


def test_a_rule_for_large_matrices_is_seen() -> None:
    assert update_kind(OnLargeOnes(parameters(), lr=0.1)) == "parameterwise"
