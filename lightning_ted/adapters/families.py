"""Hugging Face's families whose experts do not keep its contract.

Note [Experts of these families]
Step 3.7's do in all but name. LongCat-Flash's are joined by identities, of numbers beyond theirs, whose tokens need not travel; its
first weight has rows for them, which nobody reads. Llama 4's take their inputs, not their outputs, times the score; its block gives
all tokens to all experts, most of them times zero.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_ted.adapters.huggingface import HuggingFaceExperts, forward_experts
from lightning_ted.adapters.registry import register_moe_adapter
from lightning_ted.layout import Cut
from lightning_ted.moe.expert_parallel import ATTRIBUTE
from lightning_ted.topology import Topology

_MODELS = "transformers.models"


def _flag(experts: Any, transposed: bool = False) -> None:
    """Give experts the flags of the contract: with gates beside their values, without biases."""
    experts.has_gate, experts.has_bias, experts.is_concatenated, experts.is_transposed = True, False, True, transposed


@register_moe_adapter(f"{_MODELS}.step3p7.modeling_step3p7.Step3p7Experts")
def _adapt_step3p7(experts: Any) -> None:
    _flag(experts)
    experts.__dict__[ATTRIBUTE] = HuggingFaceExperts(experts)
    experts.forward = partial(forward_experts, experts)


class IdentityExperts(HuggingFaceExperts):
    """Experts of which those with the highest numbers return what they get."""

    may_choose_none = True

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self._identities = int(module.zero_expert_num)

    @override
    def expert_cuts(self, topology: Topology) -> dict[str, tuple[Cut, ...]]:
        cuts = super().expert_cuts(topology)
        rows = (self.num_experts, self._identities) if self._identities else (self.num_experts,)
        return cuts | {self._up: (Cut(0, "expert", topology.expert, rows), *cuts[self._up][1:])}

    @override
    def _lying(self, weight: Tensor) -> Tensor:
        experts = 1 if self.axes is None else self.axes.expert.size
        return super()._lying(weight)[: self.num_experts // experts]

    @override
    def run(self, holder: nn.Module, tokens_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        is_identity_TK = expert_TK >= self.num_experts
        own_T1 = weight_TK.masked_fill(~is_identity_TK, 0).sum(1, keepdim=True)
        none_TK = expert_TK.masked_fill(is_identity_TK, self.num_experts)
        out_TD = super().run(holder, tokens_TD, none_TK, weight_TK.masked_fill(is_identity_TK, 0))
        return out_TD + (tokens_TD * own_T1).to(out_TD.dtype)


@register_moe_adapter(f"{_MODELS}.longcat_flash.modeling_longcat_flash.LongcatFlashExperts")
def _adapt_longcat(experts: Any) -> None:
    _flag(experts)
    experts.__dict__[ATTRIBUTE] = IdentityExperts(experts)
    experts.forward = partial(forward_experts, experts)


@register_moe_adapter(f"{_MODELS}.llama4.modeling_llama4.Llama4TextMoe")
def _adapt_llama4(block: Any) -> None:
    _flag(block.experts, transposed=True)
    block.experts.__dict__[ATTRIBUTE] = HuggingFaceExperts(block.experts)
    block.forward = partial(_forward_llama4, block)


def _forward_llama4(block: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """What the block makes of ``[..., D]``: ``[T, D]`` and the router's logits."""
    tokens_TD = hidden_states.reshape(-1, block.hidden_dim)
    scores_TE, logits_TE = block.router(tokens_TD)
    score_TK, expert_TK = scores_TE.topk(block.top_k, dim=1)
    scaled_ND = (tokens_TD.unsqueeze(1) * score_TK.unsqueeze(2)).flatten(0, 1)
    weight_N1 = torch.ones_like(score_TK).reshape(-1, 1)
    layer: HuggingFaceExperts = block.experts.__dict__[ATTRIBUTE]
    routed_ND = layer.run(block.experts, scaled_ND, expert_TK.reshape(-1, 1), weight_N1)
    return block.shared_expert(tokens_TD) + routed_ND.view(-1, block.top_k, block.hidden_dim).sum(1), logits_TE
