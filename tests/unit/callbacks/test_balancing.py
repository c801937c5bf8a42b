from __future__ import annotations

import pytest
import torch

from lightning_ted.callbacks import ExpertBiasBalancing
from lightning_ted.callbacks.balancing import correction_biases, update_
from lightning_ted.errors import TEDError
from lightning_ted.moe import MoE, TopKRouter


def test_the_bias_chooses_and_does_not_weigh() -> None:
    torch.manual_seed(0)
    plain = TopKRouter(8, 4, 2, "sigmoid", normalize_top_k=False)
    router = TopKRouter(8, 4, 2, "sigmoid", normalize_top_k=False, correction_bias=True)
    router.load_state_dict({**plain.state_dict(), "e_score_correction_bias": torch.tensor([0.0, 0.0, 0.0, 2.0])})
    tokens = torch.randn(20, 8)
    routing = router(tokens)
    assert (routing.expert_TK == 3).any(1).all()
    scores = plain(tokens).logits_TE.sigmoid()
    assert torch.equal(routing.weight_TK, scores.gather(1, routing.expert_TK))
    assert torch.equal(routing.scores_TE, plain(tokens).scores_TE)


def test_a_bias_rises_where_the_load_is_small() -> None:
    bias = torch.zeros(4)
    update_(bias, torch.tensor([4.0, 4.0, 0.0, 8.0]), 0.1)
    assert bias.tolist() == pytest.approx([0.0, 0.0, 0.1, -0.1])


def test_layers_without_a_bias_are_passed_over() -> None:
    module = torch.nn.ModuleDict({"with": MoE(8, 8, 4, correction_bias=True), "without": MoE(8, 8, 4)})
    assert list(correction_biases(module)) == ["with"]


def test_a_rate_that_is_not_positive_is_refused() -> None:
    with pytest.raises(TEDError, match="`update_rate=0` must be positive"):
        ExpertBiasBalancing(0)


def test_a_bias_beside_a_router_of_ones_own_is_refused() -> None:
    with pytest.raises(TEDError, match="`correction_bias=True` has no effect beside `router="):
        MoE(8, 8, 4, router=TopKRouter(8, 4), correction_bias=True)
