"""All experts on this rank."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lightning_ted.moe.dispatch.interface import ExpertFunction
from lightning_ted.moe.dispatch.order import Order
from lightning_ted.moe.routing import Routing, read_sizes
from lightning_ted.moe.rows import combine_rows, expand_tokens


class LocalDispatcher:
    """Rows are sorted, nothing is sent."""

    def __call__(
        self, tokens_TD: Tensor, routing: Routing, experts: ExpertFunction, beside: Callable[[], None]
    ) -> Tensor:
        """See :class:`~lightning_ted.moe.dispatch.interface.Dispatcher`."""
        beside()
        order = Order.of(routing.expert_TK, routing.num_experts, routing.may_drop)
        counts_E = order.counts_CE.view(-1)
        sizes = read_sizes(counts_E) if order.may_drop else None
        routed = order.order_N.numel() if sizes is None else sum(sizes)
        rows_ND = expand_tokens(tokens_TD, order.order_N, order.position_TK, routed)
        rows_ND = experts(rows_ND, counts_E, sizes, True)
        return combine_rows(rows_ND, routing.weight_TK, order.order_N, order.position_TK, routed)
