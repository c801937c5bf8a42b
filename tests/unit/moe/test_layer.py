import copy
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_ted.errors import TEDError
from lightning_ted.mesh import SINGLE
from lightning_ted.moe import MoE, Routing, auxiliary_loss, expert_counts
from lightning_ted.moe.axes import MoEAxes
from lightning_ted.moe.capacity import expert_capacity, within_capacity
from lightning_ted.moe.losses import drop_rate


class Fixed(nn.Module):
    """Routes every token as it is told."""

    def __init__(self, expert_TK: list[list[int]], num_experts: int) -> None:
        super().__init__()
        self.expert_TK = torch.tensor(expert_TK)
        self.num_experts = num_experts

    def forward(self, tokens: Tensor) -> Routing:
        shape = (len(tokens), self.num_experts)
        weight = torch.full(self.expert_TK.shape, 1 / self.expert_TK.shape[1])
        return Routing(self.expert_TK, weight, torch.full(shape, 1 / self.num_experts), torch.zeros(shape))


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8), (2, 3, 4, 8), (0, 8)])
def test_any_leading_shape_is_kept(shape: tuple[int, ...]) -> None:
    assert MoE(8, 16, 4)(torch.randn(shape)).shape == shape


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_even_load_costs_one_for_every_top_k(top_k: int) -> None:
    choices = [[(token + choice) % 4 for choice in range(top_k)] for token in range(8)]
    layer = MoE(8, 16, 4, router=Fixed(choices, 4), aux_loss_coef=1.0)
    layer(torch.randn(8, 8))
    assert auxiliary_loss(layer).item() == pytest.approx(1.0)
    assert expert_counts(layer)[""].tolist() == [2 * top_k] * 4


def test_z_loss_is_the_mean_squared_log_sum_exp() -> None:
    layer = MoE(8, 16, 4, aux_loss_coef=0.0, z_loss_coef=0.5)
    x = torch.randn(6, 8)
    layer(x)
    want = 0.5 * (x @ layer.router.weight.T).logsumexp(-1).square().mean()
    torch.testing.assert_close(auxiliary_loss(layer), want)


def test_auxiliary_loss_reaches_the_router() -> None:
    layer = MoE(8, 16, 4)
    layer(torch.randn(6, 8))
    auxiliary_loss(layer).backward()
    assert layer.router.weight.grad is not None and layer.router.weight.grad.abs().sum() > 0


def test_auxiliary_loss_without_experts_or_forward_says_so() -> None:
    with pytest.raises(RuntimeError, match="Linear has no MoE layer"):
        auxiliary_loss(nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="MoE layer '' has not run yet"):
        auxiliary_loss(MoE(8, 16, 4))


def test_capacity_keeps_first_choices_and_earlier_tokens() -> None:
    expert_TK = torch.tensor([[0, 1], [1, 0], [0, 1], [0, 2]])
    # Expert 0 is the first choice of tokens 0, 2 and 3, and the second of token 1.
    assert within_capacity(expert_TK, 3, 2).tolist() == [[True, True], [True, False], [True, False], [False, True]]


@pytest.mark.parametrize(
    ("tokens", "factor", "capacity"), [(8, 1.0, 4), (7, 1.0, 4), (1, 0.1, 1), (0, 1.0, 1), (4, 100.0, 200)]
)
def test_capacity_is_rounded_up(tokens: int, factor: float, capacity: int) -> None:
    assert expert_capacity(tokens, 4, 2, factor) == capacity


def test_dropped_assignments_contribute_nothing_and_are_counted() -> None:
    torch.manual_seed(0)
    router = Fixed([[0], [0], [0], [1]], 2)
    capped, free = MoE(8, 16, 2, router=router, capacity_factor=1.0), MoE(8, 16, 2, router=router)
    free.load_state_dict(capped.state_dict())
    x = torch.randn(4, 8)
    got, want = capped(x), free(x)
    torch.testing.assert_close(got[[0, 1, 3]], want[[0, 1, 3]])
    assert got[2].abs().max() == 0
    assert drop_rate(capped)[""].item() == pytest.approx(0.25)
    assert drop_rate(free)[""].item() == 0


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf, "1", True])
def test_impossible_capacity_is_refused(factor: float) -> None:
    with pytest.raises(TEDError, match=f"`capacity_factor={factor!r}` must be positive, or None"):
        MoE(8, 16, 4, capacity_factor=factor)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("aux_loss_coef", -1.0), ("aux_loss_coef", "x"), ("z_loss_coef", math.nan), ("router", "x"), ("bias", "no")],
)
def test_impossible_arguments_are_refused(argument: str, value: object) -> None:
    with pytest.raises(TEDError, match=f"`{argument}={value!r}` must be"):
        MoE(8, 16, 4, **{argument: value})  # type: ignore[arg-type]


def test_router_that_returns_something_else_is_refused() -> None:
    with pytest.raises(
        TEDError, match="the router Linear returns a Tensor; it has to return a `lightning_ted.moe.Routing`"
    ):
        MoE(8, 16, 4, router=nn.Linear(8, 4))(torch.randn(2, 8))


def test_layer_can_be_copied_and_pickled_after_a_forward() -> None:
    layer = MoE(8, 16, 4)
    x = torch.randn(3, 8)
    want = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.statistics is None
        torch.testing.assert_close(twin(x), want)


def test_order_of_tokens_does_not_change_their_outputs() -> None:
    layer, x = MoE(8, 16, 4), torch.randn(9, 8)
    order = torch.randperm(9)
    torch.testing.assert_close(layer(x[order]), layer(x)[order])


def test_layer_trains_under_autocast() -> None:
    layer = MoE(8, 16, 4)
    with torch.autocast("cpu", torch.bfloat16):
        loss = layer(torch.randn(6, 8)).square().mean() + auxiliary_loss(layer)
    loss.backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name


@pytest.mark.parametrize(("argument", "value"), [("top_k", 1), ("score", "sigmoid"), ("normalize_top_k", False)])
def test_arguments_that_a_router_of_your_own_would_ignore_are_refused(argument: str, value: object) -> None:
    with pytest.raises(TEDError, match=f"`{argument}={value!r}` has no effect beside `router="):
        MoE(8, 16, 4, router=Fixed([[0]], 4), **{argument: value})  # type: ignore[arg-type]


def test_router_of_another_number_of_experts_is_refused() -> None:
    with pytest.raises(TEDError, match="the router Fixed chooses among 8 experts, but `num_experts=4`"):
        MoE(8, 16, 4, router=Fixed([[0]], 8))(torch.randn(1, 8))


def test_layer_that_ran_without_a_graph_has_no_auxiliary_loss_to_train_by() -> None:
    layer = MoE(8, 16, 4)
    x = torch.randn(6, 8, requires_grad=True)
    checkpoint(layer, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="MoE layer '' ran without gradients"):
        auxiliary_loss(layer)
    checkpoint(layer, x, use_reentrant=False)
    assert auxiliary_loss(layer).requires_grad
    with torch.no_grad():
        layer(x)
        assert auxiliary_loss(layer) > 0


def test_second_derivatives_are_refused() -> None:
    layer, x = MoE(8, 16, 4, activation="gelu"), torch.randn(6, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("factor", [0.1, 100.0])
def test_capacity_of_hardly_any_tokens(tokens: int, factor: float) -> None:
    capped, free = MoE(8, 16, 4, capacity_factor=factor), MoE(8, 16, 4)
    free.load_state_dict(capped.state_dict())
    x = torch.randn(tokens, 8, requires_grad=True)
    # One assignment an expert at least: nothing of one token is dropped.
    torch.testing.assert_close(capped(x), free(x))
    capped(x).sum().backward()
    assert drop_rate(capped)[""] == 0


def test_capacity_of_split_sequences_that_are_not_told_apart_is_refused() -> None:
    layer = MoE(8, 16, 4, capacity_factor=1.0)
    region = SimpleNamespace(length=3)
    layer.axes = MoEAxes(SINGLE, SINGLE, SINGLE, SINGLE, SINGLE, sequence=region)  # type: ignore[arg-type]
    assert layer(torch.randn(2, 3, 8)).shape == (2, 3, 8)
    with pytest.raises(TEDError, match=r"takes \[batch, sequence, width\], not \(6, 8\)"):
        layer(torch.randn(6, 8))


def test_output_may_be_changed_in_place() -> None:
    torch.manual_seed(0)
    layer, x = MoE(8, 16, 4), torch.randn(2, 3, 8)
    (layer(x) + x).square().sum().backward()
    want = [parameter.grad.clone() for parameter in layer.parameters() if parameter.grad is not None]
    layer.zero_grad()
    y = layer(x)
    y += x
    y.square().sum().backward()
    assert all(map(torch.equal, want, [p.grad for p in layer.parameters() if p.grad is not None]))
