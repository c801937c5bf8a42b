"""Running a function whose activations are made again."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ted.recompute import RecomputeOptions, checkpointed

FULL = RecomputeOptions("full")


def scaled(x: Tensor, *, scale: Tensor, **others: Any) -> Tensor:
    return (x * scale).exp() * others.get("factor", 1)


@pytest.mark.parametrize("bound", [False, True], ids=["keyword", "bound before"])
def test_an_argument_that_is_changed_before_backward_is_found_out(bound: bool) -> None:
    x, scale = torch.ones(3, requires_grad=True), torch.ones(3)
    if bound:
        y = checkpointed(FULL, partial(scaled, scale=scale), x)
    else:
        y = checkpointed(FULL, scaled, x, scale=scale)
    scale.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_keyword_arguments_may_have_any_name() -> None:
    taken = dict.fromkeys(("options", "function", "use_reentrant", "context_fn", "debug", "early_stop"), 3.0)
    x = torch.ones(3, requires_grad=True)
    y = checkpointed(FULL, scaled, x, scale=torch.full((3,), 2.0), factor=2, **taken)
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, 4 * torch.full((3,), 2.0).exp())


def test_nothing_is_kept_where_no_gradients_are_recorded() -> None:
    x = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        assert not checkpointed(FULL, scaled, x, scale=x).requires_grad
    with torch.inference_mode():
        assert checkpointed(FULL, scaled, x, scale=x).is_inference()
