"""The mixture-of-experts layer."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_ted.collectives.tokens import drop, restore
from lightning_ted.moe.activations import ActivationName
from lightning_ted.moe.axes import MoEAxes
from lightning_ted.moe.capacity import limit_to_capacity
from lightning_ted.moe.dispatcher import make_dispatcher
from lightning_ted.moe.experts import Experts
from lightning_ted.moe.losses import RoutingStatistics
from lightning_ted.moe.router import TopKRouter
from lightning_ted.moe.routing import Routing


class MoE(nn.Module):
    """A drop-in replacement of a feed-forward network: ``[..., d_model] -> [..., d_model]``.

    Runs whole on one device, and under tensor, expert and expert-tensor parallelism once a strategy has cut it.

    Args:
        d_model: Width of the tokens.
        d_ff: Hidden width of one expert.
        num_experts: Number of experts.
        top_k: Experts per token.
        activation: ``"swiglu"``, ``"gelu"`` or ``"relu"``.
        bias: Give the experts biases.
        capacity_factor: None routes every assignment (dropless). A number drops what exceeds
            ``ceil(tokens * top_k / num_experts * capacity_factor)`` assignments an expert; the pool of tokens is one
            data-parallel rank's micro-batch.
        score: ``"softmax"`` or ``"sigmoid"`` scores of the router.
        normalize_top_k: Divide a token's ``top_k`` weights by their sum.
        aux_loss_coef: Coefficient of the load-balancing loss in :func:`auxiliary_loss`.
        z_loss_coef: Coefficient of the router's z-loss in :func:`auxiliary_loss`.
        router: A router of your own: a module that maps tokens ``[T, D]`` to a :class:`Routing`; the arguments
            ``top_k``, ``score`` and ``normalize_top_k`` then do not apply. It has to be a pure function of the tokens.

    Attributes:
        statistics: What the last forward saw on this rank.

    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        top_k: int = 2,
        activation: ActivationName = "swiglu",
        bias: bool = False,
        capacity_factor: float | None = None,
        score: Literal["softmax", "sigmoid"] = "softmax",
        normalize_top_k: bool = True,
        aux_loss_coef: float = 0.01,
        z_loss_coef: float = 0.0,
        router: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if capacity_factor is not None and capacity_factor <= 0:
            raise ValueError(f"`capacity_factor={capacity_factor}` must be positive, or None for dropless routing.")
        self.num_experts = num_experts
        self.capacity_factor = capacity_factor
        self.aux_loss_coef = aux_loss_coef
        self.z_loss_coef = z_loss_coef
        self.experts = Experts(num_experts, d_model, d_ff, activation, bias)
        self.router = TopKRouter(d_model, num_experts, top_k, score, normalize_top_k) if router is None else router
        self.axes: MoEAxes | None = None
        self.statistics: RoutingStatistics | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., d_model] -> [..., d_model]``."""
        axes = self.axes
        shape = x.shape
        tokens_TD = x.reshape(-1, shape[-1])
        length = tokens_TD.shape[0]
        if axes is not None and axes.drops:
            tokens_TD = drop(tokens_TD, axes.tensor)
        routing = self.router(tokens_TD)
        chosen_TK = routing.expert_TK
        if self.capacity_factor is not None:
            sequence = shape[:-1] if axes is not None and axes.sequence_split else (tokens_TD.shape[0],)
            routing = limit_to_capacity(routing, self.num_experts, self.capacity_factor, tuple(sequence), axes)
        self.statistics = self._measure(routing, chosen_TK)
        out_TD = make_dispatcher(axes)(tokens_TD, routing, self.num_experts, self.experts).to(x.dtype)
        if axes is not None and axes.drops:
            out_TD = restore(out_TD, length, axes.tensor)
        return out_TD.view(shape)

    def _measure(self, routing: Routing, chosen_TK: Tensor) -> RoutingStatistics:
        flat_N = chosen_TK.reshape(-1)
        counts = flat_N.new_zeros(self.num_experts + 1).scatter_add_(0, flat_N, torch.ones_like(flat_N))
        return RoutingStatistics(
            counts_E=counts[: self.num_experts],
            scores_E=routing.scores_TE.sum(0),
            z=routing.logits_TE.logsumexp(-1).square().sum(),
            dropped=((routing.expert_TK != chosen_TK).sum() if routing.may_drop else counts.new_zeros(())),
            tokens=chosen_TK.shape[0],
            top_k=chosen_TK.shape[1],
        )

    def __getstate__(self) -> dict[str, Any]:
        # Statistics belong to one forward and carry its graph, which cannot be copied.
        return {**self.__dict__, "statistics": None}
