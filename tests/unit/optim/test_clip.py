"""The norm is taken in 32 bits at least, and the coefficient is applied in them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from lightning_ted.layout import ParamLayout
from lightning_ted.mesh import TEDMesh
from lightning_ted.optim.clip import clip_by_norm_
from lightning_ted.topology import Topology


def _parameters(*dtypes: torch.dtype) -> list[tuple[Parameter, ParamLayout]]:
    torch.manual_seed(0)
    pairs = []
    for dtype in dtypes:
        parameter = Parameter(torch.zeros(1000, dtype=dtype))
        parameter.grad = torch.rand(1000).to(dtype)
        pairs.append((parameter, ParamLayout("p", (1000,))))
    return pairs


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16,),
        (torch.bfloat16, torch.float32, torch.float64, torch.bfloat16),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
def test_gradients_of_every_dtype_are_clipped_by_their_exact_norm(dtypes: tuple[torch.dtype, ...]) -> None:
    pairs = _parameters(*dtypes)
    before = [parameter.grad.double().clone() for parameter, _ in pairs]  # type: ignore[union-attr]
    exact = torch.cat(before).norm().item()
    norm = clip_by_norm_(pairs, 0.5, TEDMesh(Topology(1)))
    assert norm.item() == pytest.approx(exact, rel=1e-6)
    for (parameter, _), grad in zip(pairs, before, strict=True):
        want = grad * (0.5 / (exact + 1e-6))
        assert parameter.grad is not None and parameter.grad.dtype == parameter.dtype
        # Rounded once, in the gradient's own dtype.
        spacing = 1e-6 if parameter.dtype != torch.bfloat16 else 2**-8
        torch.testing.assert_close(parameter.grad.double(), want, rtol=spacing, atol=0.0)


def test_without_gradients_the_norm_is_zero() -> None:
    parameter = Parameter(torch.zeros(2))
    assert clip_by_norm_([(parameter, ParamLayout("p", (2,)))], 1.0, TEDMesh(Topology(1))).item() == 0.0
