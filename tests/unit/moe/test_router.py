import pytest
import torch
from torch.nn import functional as F

from lightning_ted.moe import MoE, TopKRouter, auxiliary_loss


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_highest_scores_are_chosen_and_weights_normalised(top_k: int, score: str) -> None:
    torch.manual_seed(0)
    router = TopKRouter(8, 5, top_k, score)  # type: ignore[arg-type]
    tokens = torch.randn(11, 8)
    routing = router(tokens)
    logits = tokens @ router.weight.T
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    assert torch.equal(routing.expert_TK, scores.topk(top_k).indices)
    if top_k > 1:
        torch.testing.assert_close(routing.weight_TK.sum(-1), torch.ones(11))
    else:
        torch.testing.assert_close(routing.weight_TK[:, 0], scores.amax(-1))
    torch.testing.assert_close(routing.scores_TE.sum(-1), torch.ones(11))


def test_router_computes_in_fp32_under_autocast_and_in_bfloat16() -> None:
    torch.manual_seed(0)
    router, tokens = TopKRouter(64, 8), torch.randn(32, 64)
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(tokens)
    assert routing.logits_TE.dtype == torch.float32
    torch.testing.assert_close(routing.logits_TE, F.linear(tokens, router.weight))
    assert router.to(torch.bfloat16)(tokens.bfloat16()).logits_TE.dtype == torch.float32


@pytest.mark.parametrize("top_k", [0, 6, 1.5, "2"])
def test_impossible_top_k_is_refused(top_k: int) -> None:
    with pytest.raises(ValueError, match=rf"`top_k={top_k!r}` must be a whole number from 1 to `num_experts=5`"):
        TopKRouter(8, 5, top_k)


def test_unknown_score_is_refused() -> None:
    with pytest.raises(ValueError, match="`score='tanh'` is unknown"):
        TopKRouter(8, 5, score="tanh")  # type: ignore[arg-type]


def test_sigmoid_scores_that_vanish_leave_losses_and_gradients_finite() -> None:
    layer = MoE(4, 8, 4, score="sigmoid", z_loss_coef=0.1)
    with torch.no_grad():
        layer.router.weight.fill_(-100.0)
    output = layer(torch.ones(3, 4))
    (output.sum() + auxiliary_loss(layer)).backward()
    assert output.isfinite().all() and layer.router.weight.grad.isfinite().all()
