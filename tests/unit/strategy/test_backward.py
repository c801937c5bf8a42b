"""Summing twice is summing once, whatever the family."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Parameter

from lightning_ted.layout import ParamLayout
from lightning_ted.strategy.backward import BackwardSync

FACTORS = {"dense": 1.0, "partial": 2.0, "expert": 0.5}


class _Reducer:
    """What reducing does to gradients that are equal on every rank."""

    def __init__(self, layouts: dict[str, ParamLayout]) -> None:
        self.layouts = layouts

    def reduce(self, named: Any) -> None:
        for name, parameter in named:
            if parameter.grad is not None:
                parameter.grad.mul_(FACTORS[self.layouts[name].family])


def _make() -> tuple[BackwardSync, list[tuple[str, Parameter]]]:
    layouts = {family: ParamLayout(family, (2,), family=family) for family in FACTORS}  # type: ignore[arg-type]
    named = [(family, Parameter(torch.ones(2))) for family in FACTORS]
    return BackwardSync(_Reducer(layouts), layouts, FACTORS), named  # type: ignore[arg-type]


def _pass(sync: BackwardSync, named: list[tuple[str, Parameter]]) -> None:
    sync.before_backward(named)
    sum((parameter * 3).sum() for _, parameter in named).backward()  # type: ignore[union-attr]
    sync.after_backward(named)


def test_two_passes_give_twice_the_gradient_of_one() -> None:
    sync, named = _make()
    _pass(sync, named)
    once = [p.grad.clone() for _, p in named]  # type: ignore[union-attr]
    _pass(sync, named)
    for (_, parameter), grad in zip(named, once, strict=True):
        assert torch.equal(parameter.grad, 2 * grad)  # type: ignore[arg-type]


def test_blocked_passes_are_summed_by_the_next_one() -> None:
    sync, named = _make()
    _pass(sync, named)
    once = [p.grad.clone() for _, p in named]  # type: ignore[union-attr]
    with sync.blocked():
        _pass(sync, named)
        _pass(sync, named)
    _pass(sync, named)
    for (_, parameter), grad in zip(named, once, strict=True):
        assert torch.equal(parameter.grad, 4 * grad)  # type: ignore[arg-type]


def test_parameters_that_are_switched_off_keep_their_summed_gradient() -> None:
    sync, named = _make()
    _pass(sync, named)
    switched_off = named[2][1]
    kept = switched_off.grad.clone()  # type: ignore[union-attr]
    _pass(sync, named[:2])
    assert torch.equal(switched_off.grad, kept)  # type: ignore[arg-type]
