"""Routers: functions of tokens that know neither ranks nor capacity."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ted.errors import TEDError
from lightning_ted.moe.routing import Routing, keep_choice


def _normalized(scores: Tensor) -> Tensor:
    """Scores that sum to 1; sigmoid scores may all have vanished."""
    return scores / scores.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


class TopKRouter(nn.Module):
    """Routes every token to its ``top_k`` highest-scoring experts.

    Logits and scores are computed in fp32 whatever the precision of the tokens: 16-bit scores tie, and ties route
    differently.

    Args:
        d_model: Width of the tokens.
        num_experts: Number of experts.
        top_k: Experts per token.
        score: ``"softmax"`` over all experts, or an independent ``"sigmoid"`` of each logit.
        normalize_top_k: Divide a token's weights by their sum. A single weight is never normalised, its
            weight being the only path of a gradient to the router.
        correction_bias: Keep a bias of each expert's score, ``e_score_correction_bias``, which has a part in the choice of experts
            and none in their weights; it has no gradient, and is moved by ``ExpertBiasBalancing`` (arXiv 2408.15664).

    """

    e_score_correction_bias: Tensor | None

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 2,
        score: Literal["softmax", "sigmoid"] = "softmax",
        normalize_top_k: bool = True,
        correction_bias: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(top_k, int) or not 1 <= top_k <= num_experts:
            raise TEDError(f"`top_k={top_k!r}` must be a whole number from 1 to `num_experts={num_experts}`.")
        if score not in ("softmax", "sigmoid"):
            raise TEDError(f"`score={score!r}` is unknown; choose 'softmax' or 'sigmoid'.")
        self.num_experts = num_experts
        self.top_k = top_k
        self.score = score
        self.normalize_top_k = normalize_top_k and top_k > 1
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.register_buffer("e_score_correction_bias", torch.zeros(num_experts) if correction_bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as :class:`torch.nn.Linear` does."""
        if self.e_score_correction_bias is not None:
            nn.init.zeros_(self.e_score_correction_bias)
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, tokens_TD: Tensor) -> Routing:
        """Choose experts for ``tokens_TD`` ``[T, D]``."""
        with torch.autocast(tokens_TD.device.type, enabled=False):
            dtype = torch.promote_types(tokens_TD.dtype, torch.float32)
            logits_TE = F.linear(tokens_TD.to(dtype), self.weight.to(dtype))
            if self.score == "softmax":
                scores_TE = logits_TE.softmax(-1)
                chosen_TE = scores_TE
            else:
                chosen_TE = logits_TE.sigmoid()
                scores_TE = _normalized(chosen_TE)
            expert_TK = keep_choice(lambda: self._choose(chosen_TE.detach()))
            weight_TK = chosen_TE.gather(-1, expert_TK)
            if self.normalize_top_k:
                weight_TK = _normalized(weight_TK)
        return Routing(expert_TK, weight_TK, scores_TE, logits_TE)

    def _choose(self, scores_TE: Tensor) -> Tensor:
        bias_E = self.e_score_correction_bias
        return (scores_TE if bias_E is None else scores_TE + bias_E).topk(self.top_k, dim=-1).indices

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, top_k={self.top_k}, score={self.score}"
