"""Experts shared out over ranks: from routing to experts and back by exact sizes.

Rows travel token order -> expert order (one row per assignment) -> owner of the expert (all-to-all) -> every shard of
the expert (all-gather) -> grouped by local expert; and back the same way. Results do not depend on the layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ted.collectives.expert import Journey, send_back, send_out
from lightning_ted.collectives.primitives import all_gather
from lightning_ted.collectives.tape import is_replayed, kept
from lightning_ted.mesh import SINGLE, Axis
from lightning_ted.moe.axes import MoEAxes
from lightning_ted.moe.dispatch.interface import ExpertFunction
from lightning_ted.moe.dispatch.order import Order, regroup
from lightning_ted.moe.dispatch.wiring import FlatWiring, HierarchicalWiring, Wiring
from lightning_ted.moe.routing import Routing, read_sizes
from lightning_ted.moe.rows import combine_rows, expand_tokens, permute_rows


@dataclass(frozen=True)
class Leg:
    """A chunk of rows that travels on its own.

    Attributes:
        journey: Its way.
        sent: Rows that this rank sends.
        sizes_e: Rows of each local expert, of all sources together, on the host.
        counts_e: The same on the device.
        chunks_Se: Rows by source (lane and sender) and local expert, in order of arrival; on the device.

    """

    journey: Journey
    sent: int
    sizes_e: list[int]
    counts_e: Tensor
    chunks_Se: Tensor


class ExchangingDispatcher:
    """Experts shared out over the expert axis, each cut over the expert-tensor axis.

    Args:
        axes: The layer's axes. Where tensor ranks dispatch different tokens, an expert's shards gather each other's
            rows and reduce-scatter their partial outputs. Where they dispatch the same tokens (no duplicate token
            dropping), the shards hold the same rows already, and all-reduce.
        wiring: How rows are exchanged over the expert axis.

    """

    def __init__(self, axes: MoEAxes, wiring: Wiring) -> None:
        self._wiring = wiring
        self._chunks = axes.overlap_chunks
        self._shards = axes.expert_tensor
        self._splits = axes.tokens_are_split
        self._lanes: Axis = axes.expert_tensor if self._splits else SINGLE

    def __call__(
        self, tokens_TD: Tensor, routing: Routing, experts: ExpertFunction, beside: Callable[[], None]
    ) -> Tensor:
        """See :class:`~lightning_ted.moe.dispatch.interface.Dispatcher`.

        All chunks are sent off at once, so that the experts compute on one while the next ones are under way.
        """
        expert_TK = self._wiring.place(routing.expert_TK, routing.num_experts)
        order = Order.of(expert_TK, routing.num_experts, routing.may_drop, self._chunks)
        legs = kept("sizes", None, order.counts_CE.shape, lambda: self._agree(order.counts_CE))
        routed = sum(leg.sent for leg in legs)
        rows_ND = expand_tokens(tokens_TD, order.order_N, order.position_TK, routed)
        pieces = rows_ND.split([leg.sent for leg in legs]) if len(legs) > 1 else [rows_ND]
        arrivals = [send_out(piece_ND, leg.journey) for piece_ND, leg in zip(pieces, legs, strict=True)]
        beside()
        returns = [
            send_back(_compute(arrival(), leg, experts), leg.journey)
            for arrival, leg in zip(arrivals, legs, strict=True)
        ]
        returned = [arrival() for arrival in returns]
        rows_ND = torch.cat(returned) if len(returned) > 1 else returned[0]
        return combine_rows(rows_ND, routing.weight_TK, order.order_N, order.position_TK, routed)

    def _agree(self, counts_CE: Tensor) -> list[Leg]:
        told = self._wiring.tell(counts_CE)
        lanes_LCPe = all_gather(told.arrived_CPe, self._lanes)
        counts_Ce = lanes_LCPe.sum((0, 2))
        lanes_CL = lanes_LCPe.sum((2, 3)).T
        sizes = read_sizes(torch.cat([counts_Ce, lanes_CL, told.sizes_CX], 1))
        legs = []
        local, lanes = counts_Ce.shape[1], self._lanes.size
        for chunk, numbers in enumerate(sizes):
            received = numbers[local : local + lanes]
            exchange = self._wiring.exchange(told, chunk, numbers[local + lanes :])
            journey = Journey(exchange, self._shards, received if self._splits else None)
            chunks_Se = lanes_LCPe[:, chunk].reshape(-1, local)
            legs.append(Leg(journey, exchange.rows, numbers[:local], counts_Ce[chunk], chunks_Se))
        return legs


def _compute(rows_ND: Tensor, leg: Leg, experts: ExpertFunction) -> Tensor:
    """What the local experts make of rows in order of arrival, in that order."""
    kind, _ = leg.journey.last_collective
    is_read = not is_replayed(kind)
    if min(leg.chunks_Se.shape) == 1:
        return experts(rows_ND, leg.counts_e, leg.sizes_e, is_read)
    index, inverse = regroup(leg.chunks_Se, rows_ND.shape[0])
    rows_ND = experts(permute_rows(rows_ND, index, inverse), leg.counts_e, leg.sizes_e, is_read)
    return permute_rows(rows_ND, inverse, index)


def make_flat(axes: MoEAxes) -> ExchangingDispatcher:
    """One all-to-all over the expert axis."""
    return ExchangingDispatcher(axes, FlatWiring(axes.expert))


def make_hierarchical(axes: MoEAxes) -> ExchangingDispatcher:
    """Inside the node, then across; where the expert axis is inside one node, or has one rank in each, one all-to-all."""
    if axes.inside.size == 1 or axes.across.size == 1:
        return make_flat(axes)
    return ExchangingDispatcher(axes, HierarchicalWiring(axes.expert, axes.inside, axes.across))
