"""From routing to experts and back: the only place of a MoE layer that communicates about tokens.

Rows travel token order -> expert order (one row per assignment) -> owner of the expert (all-to-all) -> every shard of
the expert (all-gather) -> grouped by local expert; and back the same way. Exact sizes are sent, so results do not
depend on the layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from lightning_ted.collectives.expert import exchange_rows, gather_rows_to_shards, sum_shards_to_rows
from lightning_ted.collectives.primitives import all_gather, all_to_all_rows
from lightning_ted.collectives.tensor import copy_to_shards, sum_shards
from lightning_ted.mesh import SINGLE
from lightning_ted.moe.axes import MoEAxes
from lightning_ted.moe.routing import count_experts
from lightning_ted.moe.rows import combine_rows, expand_tokens, permute_rows

#: Rows in expert order, rows of each expert, and the same on the host where it is known already.
ExpertFunction = Callable[[Tensor, Tensor, list[int] | None], Tensor]


@dataclass(frozen=True)
class Order:
    """The assignments of a batch of tokens, sorted by expert.

    Attributes:
        order_N: Assignment (token * K + choice) of every row; those that are not routed come last.
        position_TK: Row of every assignment: the inverse of ``order_N``.
        counts_E: Rows of each expert.
        may_drop: Whether some assignments may not be routed.

    """

    order_N: Tensor
    position_TK: Tensor
    counts_E: Tensor
    may_drop: bool = False

    @classmethod
    def of(cls, expert_TK: Tensor, num_experts: int, may_drop: bool = False) -> Order:
        """Sort the assignments, keeping the order of the tokens within an expert."""
        order_N = expert_TK.reshape(-1).argsort(stable=True)
        position_N = torch.empty_like(order_N)
        position_N[order_N] = torch.arange(len(order_N), device=order_N.device)
        return cls(order_N, position_N.view(expert_TK.shape), count_experts(expert_TK, num_experts), may_drop)


def read_sizes(sizes: Tensor) -> list[int]:
    """The one place where sizes that depend on routing reach the host: once a layer."""
    return sizes.tolist()


class LocalDispatcher:
    """All experts on this rank: rows are sorted, nothing is sent."""

    def __call__(self, tokens_TD: Tensor, weight_TK: Tensor, order: Order, experts: ExpertFunction) -> Tensor:
        """``[T, D]`` through the experts, weighed and summed: ``[T, D]``."""
        sizes = read_sizes(order.counts_E) if order.may_drop else None
        routed = order.order_N.numel() if sizes is None else sum(sizes)
        rows_ND = expand_tokens(tokens_TD, order.order_N, order.position_TK, routed)
        rows_ND = experts(rows_ND, order.counts_E, sizes)
        return combine_rows(rows_ND, weight_TK, order.order_N, order.position_TK, routed)


@dataclass(frozen=True)
class ExchangePlan:
    """Who sends how many rows to whom, on the host.

    Attributes:
        sent: Rows to every rank of the expert axis.
        received: Rows from every rank of the expert axis.
        lanes: Rows that every rank of the expert-tensor axis received.
        sizes_e: Rows of each local expert, all lanes together.
        counts_e: The same on the device.
        chunks_Se: Rows by source (lane and sender) and local expert, in order of arrival; on the device.

    """

    sent: list[int]
    received: list[int]
    lanes: list[int]
    sizes_e: list[int]
    counts_e: Tensor
    chunks_Se: Tensor


class ExpertParallelDispatcher:
    """Experts shared out over the expert axis, each cut over the expert-tensor axis.

    Args:
        axes: The layer's axes. Where tensor ranks dispatch different tokens, an expert's shards gather each other's
            rows and reduce-scatter their partial outputs. Where they dispatch the same tokens (no duplicate token
            dropping), the shards hold the same rows already, and all-reduce.

    """

    def __init__(self, axes: MoEAxes) -> None:
        self._expert = axes.expert
        self._shards = axes.expert_tensor
        self._lanes = axes.expert_tensor if axes.tokens_are_split else SINGLE

    def __call__(self, tokens_TD: Tensor, weight_TK: Tensor, order: Order, experts: ExpertFunction) -> Tensor:
        """``[T, D]`` through the experts of all ranks, weighed and summed: ``[T, D]``."""
        plan = self._agree(order.counts_E)
        routed = sum(plan.sent)
        rows_ND = expand_tokens(tokens_TD, order.order_N, order.position_TK, routed)
        rows_ND = exchange_rows(rows_ND, plan.received, plan.sent, self._expert)
        rows_ND = self._on_shards(rows_ND, plan, experts)
        rows_ND = exchange_rows(rows_ND, plan.sent, plan.received, self._expert)
        return combine_rows(rows_ND, weight_TK, order.order_N, order.position_TK, routed)

    def _on_shards(self, rows_ND: Tensor, plan: ExchangePlan, experts: ExpertFunction) -> Tensor:
        shards, lanes = self._shards, self._lanes
        rows_ND = (
            gather_rows_to_shards(rows_ND, plan.lanes, lanes) if lanes.size > 1 else copy_to_shards(rows_ND, shards)
        )
        if plan.chunks_Se.shape[0] == 1 or plan.chunks_Se.shape[1] == 1:
            rows_ND = experts(rows_ND, plan.counts_e, plan.sizes_e)
        else:
            index, inverse = regroup(plan.chunks_Se, rows_ND.shape[0])
            rows_ND = experts(permute_rows(rows_ND, index, inverse), plan.counts_e, plan.sizes_e)
            rows_ND = permute_rows(rows_ND, inverse, index)
        return sum_shards_to_rows(rows_ND, plan.lanes, lanes) if lanes.size > 1 else sum_shards(rows_ND, shards)

    def _agree(self, counts_E: Tensor) -> ExchangePlan:
        peers = self._expert.size
        counts_Pe = counts_E.view(peers, -1)
        arrived_Pe = all_to_all_rows(counts_Pe, [1] * peers, [1] * peers, self._expert)
        lanes_LPe = all_gather(arrived_Pe, self._lanes)
        lanes, counts_e = self._lanes.size, lanes_LPe.sum((0, 1))
        sizes = iter(read_sizes(torch.cat([counts_Pe.sum(1), lanes_LPe.sum(2).view(-1), counts_e])))
        sent = list(islice(sizes, peers))
        arrived = [list(islice(sizes, peers)) for _ in range(lanes)]
        return ExchangePlan(
            sent=sent,
            received=arrived[self._lanes.rank],
            lanes=[sum(lane) for lane in arrived],
            sizes_e=list(sizes),
            counts_e=counts_e,
            chunks_Se=lanes_LPe.view(lanes * peers, -1),
        )


def regroup(chunks_Se: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The permutation from order of arrival (source, then expert) to (expert, then source), and its inverse.

    Args:
        chunks_Se: Rows by source and expert.
        rows: Their sum.

    """

    def starts(lengths: Tensor) -> Tensor:
        return lengths.reshape(-1).cumsum(0) - lengths.reshape(-1)

    chunks_eS = chunks_Se.T
    arrival_Se = starts(chunks_Se).view_as(chunks_Se)
    grouped_eS = starts(chunks_eS).view_as(chunks_eS)
    shift_eS = arrival_Se.T - grouped_eS
    along = torch.arange(rows, device=chunks_Se.device)
    index = along + shift_eS.reshape(-1).repeat_interleave(chunks_eS.reshape(-1), output_size=rows)
    inverse = along - shift_eS.T.reshape(-1).repeat_interleave(chunks_Se.reshape(-1), output_size=rows)
    return index, inverse


def make_dispatcher(axes: MoEAxes | None) -> LocalDispatcher | ExpertParallelDispatcher:
    """The dispatcher that the axes call for; no collective where all experts are here and whole."""
    if axes is None or (axes.expert.size == 1 and axes.expert_tensor.size == 1):
        return LocalDispatcher()
    return ExpertParallelDispatcher(axes)
