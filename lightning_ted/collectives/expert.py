"""The journey of rows ``[N, D]`` to their experts and back. Sizes are exact, never padded.

On the way out, an exchange takes rows to the owners of the experts, and an all-gather to all shards of one, which have
received different rows. On the way back, a reduce-scatter sums the shards' partial outputs, and the exchange is undone.
These replace the paper's all-gather before and all-reduce-then-drop after an expert: a reduce-scatter is just that, at half
the bytes. Where the shards hold the same rows (no duplicate token dropping), there is no all-gather, and an all-reduce in
place of the reduce-scatter. Each way is the gradient of the other.

A way is gone in two halves, between which other work can be done, in backward as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_ted.collectives.exchange import Exchange
from lightning_ted.collectives.phase import dual
from lightning_ted.collectives.primitives import all_gather_rows, all_reduce, reduce_scatter_rows, signature
from lightning_ted.collectives.tape import RecomputationError, is_replayed, kept, unseen
from lightning_ted.mesh import Axis

#: Gives what arrives.
Arrival = Callable[[], Tensor]


@dataclass(frozen=True)
class Journey:
    """Both ways of a set of rows.

    Attributes:
        exchange: Between the ranks that hold the tokens and those that hold the experts.
        shards: The expert-tensor axis.
        lanes: How many rows each rank of ``shards`` has received; None if all of them hold the same rows.

    """

    exchange: Exchange
    shards: Axis
    lanes: Sequence[int] | None

    @property
    def last_collective(self) -> tuple[str, Axis]:
        """What rows come out of that have come back."""
        if self.exchange.axis.size > 1:
            return "all_to_all", self.exchange.axis
        return "all_reduce" if self.lanes is None else "reduce_scatter", self.shards

    def out(self, rows: Tensor) -> Arrival:
        """Send rows to their experts."""
        exchange, lanes, sent = self.exchange, self.lanes, signature(rows)
        if exchange.axis.size == 1:
            pending: Arrival = rows.detach
        else:
            pending = _start("all_to_all", lambda: exchange.start_out(rows))

        def exchanged() -> Tensor:
            if exchange.axis.size == 1:
                return pending()
            return kept("all_to_all", exchange.axis, sent, lambda: exchange.finish_out(pending()))

        if lanes is None or self.shards.size == 1:
            return exchanged
        # One piece, if what has been gathered is kept: what it was gathered from is not kept besides.
        return lambda: kept("all_gather", self.shards, sent, lambda: all_gather_rows(exchanged(), lanes, self.shards))

    def back(self, rows: Tensor) -> Arrival:
        """Send what experts have made of the rows back to their tokens."""
        (kind, axis), sent = self.last_collective, signature(rows)
        # In a recomputation, experts do not make what nobody reads.
        pending = _refuse if is_replayed(kind) else _start(kind, lambda: self.exchange.start_back(self._sum(rows)))
        return lambda: kept(kind, axis, sent, lambda: self.exchange.finish_back(pending()))

    def _sum(self, rows: Tensor) -> Tensor:
        if self.lanes is None:
            return all_reduce(rows, self.shards)
        return reduce_scatter_rows(rows, self.lanes, self.shards)


def _start(kind: str, start: Callable[[], Tensor]) -> Arrival:
    """Start now; only when asked to, where a tape holds what will arrive."""
    if is_replayed(kind):
        return start
    pending = unseen(start)
    return lambda: pending


def _refuse() -> Tensor:
    raise RecomputationError("What came back from the experts has been changed in place; copy it before it is changed.")


class Parcel:
    """Rows under way, and then their gradient.

    Args:
        way: Sends the rows.
        dual: Sends the gradient back.

    Attributes:
        arrival, returned: What :func:`send` and the backward of :func:`receive` have left to be fetched.

    """

    def __init__(self, way: Callable[[Tensor], Arrival], dual: Callable[[Tensor], Arrival]) -> None:
        self.way = way
        self.dual = dual
        self.arrival: Arrival | None = None
        self.returned: Arrival | None = None


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, parcel: Parcel) -> Tensor:
        parcel.arrival = parcel.way(rows)
        ctx.parcel = parcel
        # It ties the halves together in the graph; what is under way has, in backward, another shape than in forward.
        return rows.new_empty(0)

    @staticmethod
    @dual
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        fetch, ctx.parcel.returned = ctx.parcel.returned, None
        return fetch(), None


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, string: Tensor, parcel: Parcel) -> Tensor:
        ctx.parcel = parcel
        fetch, parcel.arrival = parcel.arrival, None
        assert fetch is not None
        return fetch()

    @staticmethod
    @dual
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.parcel.returned = ctx.parcel.dual(grad)
        return grad.new_zeros(0), None


def send_out(rows: Tensor, journey: Journey) -> Arrival:
    """Send rows to their experts; what is returned gives those that have come here. Both are differentiable."""
    return _send(rows, Parcel(journey.out, journey.back))


def send_back(rows: Tensor, journey: Journey) -> Arrival:
    """Send rows from their experts to their tokens; what is returned gives those that have come back here."""
    return _send(rows, Parcel(journey.back, journey.out))


def _send(rows: Tensor, parcel: Parcel) -> Arrival:
    string = _Send.apply(rows, parcel)
    return lambda: _Receive.apply(string, parcel)
