"""The norm is taken in 32 bits at least, and the coefficient is applied in them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_ted.collectives.recorder import CommRecorder
from lightning_ted.mesh import TEDMesh
from lightning_ted.optim.norm import clip_coefficient, global_norm
from lightning_ted.topology import Topology
from tests.support.stepping import Twin

CPU = torch.device("cpu")


def _mesh() -> TEDMesh:
    return TEDMesh(Topology(1))


def _grads(*dtypes: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(1000, generator=generator).to(dtype) for dtype in dtypes]


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16,),
        (torch.bfloat16, torch.float32, torch.float64, torch.bfloat16),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
def test_gradients_of_every_dtype_have_their_exact_norm(dtypes: tuple[torch.dtype, ...]) -> None:
    grads = _grads(*dtypes)
    exact = torch.cat([grad.double() for grad in grads]).norm().item()
    norm = global_norm(grads, [1.0] * len(grads), _mesh(), CPU)
    assert norm.dtype == torch.float64 and norm.dim() == 0
    assert norm.item() == pytest.approx(exact, rel=1e-6)


def test_what_several_ranks_own_counts_by_its_share() -> None:
    first, second = _grads(torch.float32, torch.float64)
    norm = global_norm([first, second], [0.25, 1.0], _mesh(), CPU)
    assert norm.item() == pytest.approx((0.25 * first.square().sum() + second.square().sum()).sqrt().item(), rel=1e-6)


def test_without_gradients_the_norm_is_zero() -> None:
    assert global_norm([], [], _mesh(), CPU).item() == 0.0


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_is_seen(bad: float) -> None:
    assert not global_norm([torch.tensor([1.0, bad]), torch.ones(2)], [1.0, 0.5], _mesh(), CPU).isfinite()


def test_squares_do_not_overflow_in_16_bits() -> None:
    grads = [torch.full((4,), 60000.0, dtype=torch.float16)]
    assert global_norm(grads, [1.0], _mesh(), CPU).item() == pytest.approx(120000.0, rel=1e-3)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_the_coefficient_is_torchs(size: float) -> None:
    parameter = Parameter(torch.zeros(10, dtype=torch.float64))
    grad = parameter.grad = torch.full((10,), size, dtype=torch.float64)
    before = grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(parameter, 0.5)
    torch.testing.assert_close(before * clip_coefficient(norm, 0.5), grad, rtol=1e-14, atol=0.0)


def _twin(dtype: torch.dtype = torch.float64) -> Twin:
    return Twin(_mesh(), lambda ps: torch.optim.SGD(ps.values(), lr=0.1), [(3, 4), (50,), ()], dtype)


def test_the_norm_is_computed_once_for_the_same_gradients() -> None:
    twin = _twin()
    twin.backward(0)
    first = twin.share.grad_norm()
    assert twin.share.grad_norm() is first
    with twin.mesh.recording(CommRecorder()) as recorder:
        twin.training.grad_norm()
    assert not recorder.calls


def test_a_gradient_in_the_place_of_a_former_one_is_noticed() -> None:
    twin = _twin()
    twin.backward(0)
    for _ in range(20):
        for parameter in twin.ours.values():
            # Memory that has just been freed is what the next tensor gets.
            parameter.grad = parameter.grad * 2  # type: ignore[operator]
            parameter.grad = parameter.grad * 2
        exact = torch.nn.utils.get_total_norm([p.grad for p in twin.ours.values() if p.grad is not None])
        assert twin.share.grad_norm().item() == pytest.approx(exact.item(), rel=1e-12)


@pytest.mark.parametrize("limit", [0.25, 100.0])
def test_clipped_by_norm_a_step_is_torchs(limit: float) -> None:
    twin = _twin()
    twin.backward(0)
    twin.share.clip_by_norm(limit)
    torch.nn.utils.clip_grad_norm_(twin.theirs.values(), limit)
    twin.step()
    assert twin.error() < 1e-12


def test_clipped_by_value_a_step_is_torchs_however_gradients_lie_in_memory() -> None:
    twin = _twin()
    twin.backward(0)
    grad = twin.ours["p0"].grad
    assert grad is not None
    twin.ours["p0"].grad = grad.t().contiguous().t()
    twin.share.clip_by_value(0.25)
    torch.nn.utils.clip_grad_value_(twin.theirs.values(), 0.25)
    twin.step()
    assert twin.error() < 1e-12
