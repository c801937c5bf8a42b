"""Experts of a foreign MoE block, whose router and forward stay as they are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_ted.collectives.phase import in_backward
from lightning_ted.collectives.tensor import to_autocast
from lightning_ted.collectives.tokens import drop, restore, share
from lightning_ted.mesh import SINGLE
from lightning_ted.moe.axes import MoEAxes
from lightning_ted.moe.dispatch import Dispatcher, make_dispatcher
from lightning_ted.moe.expert_parallel import ExpertParallelLayer
from lightning_ted.moe.routing import Routing, count_experts, keep_choice
from lightning_ted.moe.statistics import RoutingStatistics


class ForeignExperts(ExpertParallelLayer):
    """Sends what a foreign block has routed to its experts, wherever they are.

    The block routes all tokens on every tensor rank, which hold the same ones; each of them then dispatches its share (duplicate
    token dropping behind the router). The gradients of the router and of the tokens are gathered from all of them again, so
    every weight of the block outside the experts has its whole gradient on each.

    Args:
        num_experts: Number of experts.

    Attributes:
        may_choose_none: Whether a token may choose the number of experts itself, which is none.

    """

    may_choose_none = False

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        #: Ordinary networks in the module that holds the weights.
        self.beside: tuple[str, ...] = ()
        self.axes: MoEAxes | None = None
        self._statistics: RoutingStatistics | None = None
        self._dispatcher: Dispatcher | None = None

    @property
    @override
    def statistics(self) -> RoutingStatistics | None:
        return self._statistics

    @override
    def shared_expert_names(self) -> Iterable[str]:
        return self.beside

    @override
    def end_step(self) -> None:
        pass  # counts have no graph

    @override
    def place(self, axes: MoEAxes) -> None:
        if axes is not self.axes:
            self.axes, self._dispatcher = axes, None

    @torch.compiler.disable(reason="how many rows go where is read on the host")
    def run(self, holder: nn.Module, tokens_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """``[T, D]`` through the experts, weighed and summed: ``[T, D]``.

        Args:
            holder: The module that holds the experts' weights.
            tokens_TD: All tokens of this data rank.
            expert_TK: Their experts, of those of all ranks.
            weight_TK: The weights of what these make of them.

        """
        split = SINGLE if self.axes is None or not self.axes.drops else self.axes.tensor
        length = tokens_TD.shape[0]
        expert_TK = keep_choice(lambda: expert_TK.detach().to(torch.int64))
        routing = self._routing(share(expert_TK, 0, split), drop(weight_TK, split))
        self._note(routing)
        if self._dispatcher is None:
            self._dispatcher = make_dispatcher(self.axes)

        def experts(rows_ND: Tensor, counts_e: Tensor, sizes_e: list[int] | None, is_read: bool) -> Tensor:
            return self.compute(holder, rows_ND, counts_e, sizes_e, is_read)

        out_TD = self._dispatcher(to_autocast(drop(tokens_TD, split)), routing, experts, lambda: None)
        return restore(out_TD, length, split).to(tokens_TD.dtype)

    @abstractmethod
    def compute(
        self, holder: nn.Module, rows_ND: Tensor, counts_e: Tensor, sizes_e: list[int] | None, is_read: bool
    ) -> Tensor:
        """What this rank's experts make of rows in their order; see :data:`~lightning_ted.moe.dispatch.ExpertFunction`."""

    def _routing(self, expert_TK: Tensor, weight_TK: Tensor) -> Routing:
        # Scores and logits are the block's own business.
        nothing = weight_TK.new_empty((0, self.num_experts))
        return Routing(expert_TK, weight_TK, nothing, nothing, self.may_choose_none)

    def _note(self, routing: Routing) -> None:
        if in_backward():
            return  # a recomputation sees nothing new
        counts_E = count_experts(routing.expert_TK, self.num_experts)
        zeros = counts_E.new_zeros((self.num_experts,), dtype=torch.float32)
        self._statistics = RoutingStatistics(
            counts_E=counts_E,
            scores_E=zeros,
            z=zeros.sum(),
            dropped=counts_E.new_zeros(()),
            tokens=routing.expert_TK.shape[0],
            top_k=routing.expert_TK.shape[1],
            is_finished=True,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_statistics": None, "_dispatcher": None}
