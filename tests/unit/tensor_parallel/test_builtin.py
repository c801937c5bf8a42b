"""What "auto" finds to cut in torch's own layers, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_ted.errors import PlanError
from lightning_ted.moe import MoE
from lightning_ted.strategy.sizes import module_styles, resolve_sizes
from lightning_ted.tensor_parallel.builtin import builtin_styles
from lightning_ted.tensor_parallel.plan import Style

ATTENTION = Style("multihead_attention")
FEED_FORWARD = {"x.linear1": Style("colwise"), "x.linear2": Style("rowwise")}


def encoder(heads: int = 4, hidden: int = 32, **options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(16, heads, hidden, **options)


def holding(module: nn.Module, **plan: str) -> nn.ModuleDict:
    root = nn.ModuleDict({"x": module})
    root.tp_plan = plan  # type: ignore[assignment]
    return root


def styles(module: nn.Module) -> dict[str, Style]:
    return module_styles(holding(module), "auto")


class OwnForward(nn.TransformerEncoderLayer):
    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(src)


class OwnFeedForward(nn.TransformerDecoderLayer):
    def _ff_block(self, x: Tensor) -> Tensor:
        return self.linear2(self.activation(self.linear1(x)).softmax(-1))


class OnlyNamed(nn.TransformerEncoderLayer):
    """Nothing of its own but arguments."""

    def __init__(self) -> None:
        super().__init__(16, 4, 32)


class OwnAttention(nn.MultiheadAttention):
    pass


def test_layers_of_torch_are_found_wherever_they_are() -> None:
    assert styles(encoder()) == {"x.self_attn": ATTENTION} | FEED_FORWARD
    assert styles(OnlyNamed()) == styles(encoder())
    decoder = styles(nn.TransformerDecoderLayer(16, 4, 32))
    assert decoder == {"x.self_attn": ATTENTION, "x.multihead_attn": ATTENTION} | FEED_FORWARD
    assert styles(nn.Sequential(nn.MultiheadAttention(16, 4))) == {"x.0": ATTENTION}
    assert len(styles(nn.Transformer(16, 4, 3, 2, 32, batch_first=True))) == 3 * 3 + 2 * 4


def test_a_layer_with_two_names_is_found_under_both() -> None:
    shared = nn.MultiheadAttention(16, 4)
    assert styles(nn.ModuleList([shared, shared])) == {"x.0": ATTENTION, "x.1": ATTENTION}


def test_methods_of_a_users_own_are_not_bypassed() -> None:
    assert styles(OwnForward(16, 4, 32)) == {"x.self_attn": ATTENTION}
    assert FEED_FORWARD.keys().isdisjoint(styles(OwnFeedForward(16, 4, 32)))
    assert styles(OwnAttention(16, 4)) == {}


def _with_norm(of: str) -> nn.Module:
    module = encoder()
    owner, _, leaf = of.rpartition(".")
    parametrizations.weight_norm(module.get_submodule(owner), leaf)
    return module


@pytest.mark.parametrize(
    ("of", "left"),
    [
        ("linear1.weight", {"x.self_attn"}),
        ("self_attn.in_proj_weight", set(FEED_FORWARD)),
        ("self_attn.out_proj.weight", set(FEED_FORWARD)),
    ],
)
def test_weights_that_are_made_of_others_stay_whole(of: str, left: set[str]) -> None:
    assert styles(_with_norm(of)).keys() == left


@pytest.mark.parametrize(
    "activation",
    [
        "relu",
        "gelu",
        F.silu,
        torch.tanh,
        nn.GELU("tanh"),
        nn.ReLU(inplace=True),
        nn.LeakyReLU(),
        lambda x: x.relu() ** 2,
    ],
)
def test_activations_of_single_features_may_see_a_part_of_them(activation: Any) -> None:
    assert FEED_FORWARD.keys() <= styles(encoder(activation=activation)).keys()


@pytest.mark.parametrize("activation", [nn.Softmax(-1), F.glu, nn.PReLU(), nn.PReLU(32), nn.LayerNorm(32)])
def test_other_activations_see_all_of_them(activation: Any) -> None:
    assert styles(encoder(activation=activation)) == {"x.self_attn": ATTENTION}


def test_looking_at_an_activation_draws_no_number() -> None:
    layer = encoder(activation=nn.RReLU())
    state = torch.get_rng_state()
    assert styles(layer) == {"x.self_attn": ATTENTION}
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ({"x": "replicate"}, {"x": "replicate"}),
        ({"x.linear1": "replicate"}, {"x.linear1": "replicate", "x.self_attn": "multihead_attention"}),
        (
            {"x.self_attn.out_proj": "replicate"},
            {"x.self_attn.out_proj": "replicate", "x.linear1": "colwise", "x.linear2": "rowwise"},
        ),
        (
            {"x.norm1": "replicate"},
            {
                "x.norm1": "replicate",
                "x.self_attn": "multihead_attention",
                "x.linear1": "colwise",
                "x.linear2": "rowwise",
            },
        ),
    ],
)
def test_what_a_users_plan_names_keeps_its_style(plan: dict[str, str], expected: dict[str, str]) -> None:
    found = module_styles(holding(encoder(), **plan), "auto")
    assert {name: style.name for name, style in found.items()} == expected


def test_an_explicit_plan_is_all_there_is() -> None:
    root = holding(encoder())
    assert module_styles(root, {}) == {}
    assert module_styles(root, {"x.self_attn": "multihead_attention"}) == {"x.self_attn": ATTENTION}


def test_inside_of_a_moe_layer_nothing_is_found() -> None:
    moe = MoE(16, 32, 4, shared_expert=encoder())
    assert styles(moe) == {}
    assert len(builtin_styles(holding(moe), (), ())) == 3


def resolved(module: nn.Module, tensor: Any) -> int:
    return resolve_sizes(holding(module), 4, 4, tensor, "auto", None, "expert_first", "auto").tensor


def test_the_tensor_degree_has_to_divide_heads_and_widths() -> None:
    assert resolved(encoder(), "auto") == 4
    assert resolved(encoder(hidden=6), "auto") == 2
    assert resolved(nn.MultiheadAttention(12, 3), "auto") == 1
    with pytest.raises(PlanError, match=r"size=4` does not divide 'x.num_heads' = 2; choose one of 1, 2, or leave"):
        resolved(nn.MultiheadAttention(16, 2), 4)
    with pytest.raises(PlanError, match=r"size=4` does not divide the width 6 of 'x.linear1'; choose one of 1, 2"):
        resolved(encoder(hidden=6), 4)


def test_attention_that_cannot_be_cut_is_refused_where_it_is_named() -> None:
    for module, message in (
        (OwnAttention(16, 4), r"fits a torch.nn.MultiheadAttention itself, not a OwnAttention"),
        (nn.Linear(4, 4), r"fits a torch.nn.MultiheadAttention itself, not a Linear"),
        (_with_norm("self_attn.out_proj.weight").self_attn, r"'x.out_proj' makes its weight from other parameters"),
        (_with_norm("self_attn.in_proj_weight").self_attn, r"'x' makes its weight from other parameters"),
    ):
        with pytest.raises(PlanError, match=message):
            resolve_sizes(holding(module), 2, 2, 2, "auto", None, "expert_first", {"x": "multihead_attention"})  # type: ignore[arg-type]
