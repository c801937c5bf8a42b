"""All-to-alls of rows ``[N, D]`` over the expert axis, in halves between which other work can be done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lightning_ted.collectives.primitives import all_to_all_rows, start_all_to_all_rows, wait
from lightning_ted.mesh import Axis


class Exchange(Protocol):
    """Rows on their way between the ranks that hold the tokens and those that hold the experts."""

    @property
    def axis(self) -> Axis:
        """The expert axis."""

    @property
    def rows(self) -> int:
        """How many rows this rank sends out."""

    def start_out(self, rows: Tensor) -> Tensor:
        """Send rows, in the order that the exchange wants, to the experts' ranks. What is returned is not to be read."""

    def finish_out(self, pending: Tensor) -> Tensor:
        """Rows in the order of the ranks that they come from."""

    def start_back(self, rows: Tensor) -> Tensor:
        """Send rows back to where they came from. What is returned is not to be read."""

    def finish_back(self, pending: Tensor) -> Tensor:
        """Rows in the order in which they were sent out."""


@dataclass(frozen=True)
class FlatExchange:
    """One all-to-all; rows go out in the order of the ranks that they go to.

    Attributes:
        axis: The expert axis.
        sent: Rows to every rank on the way out.
        received: Rows from every rank.

    """

    axis: Axis
    sent: Sequence[int]
    received: Sequence[int]

    @property
    def rows(self) -> int:
        return sum(self.sent)

    def start_out(self, rows: Tensor) -> Tensor:
        return rows if self.axis.size == 1 else start_all_to_all_rows(rows, self.received, self.sent, self.axis)

    def finish_out(self, pending: Tensor) -> Tensor:
        return pending if self.axis.size == 1 else wait(pending)

    def start_back(self, rows: Tensor) -> Tensor:
        return rows if self.axis.size == 1 else start_all_to_all_rows(rows, self.sent, self.received, self.axis)

    finish_back = finish_out


@dataclass(frozen=True)
class HierarchicalExchange:
    """Two all-to-alls: inside the node, to the rank of the receiver's place there; then across nodes, between equal places.

    The same bytes cross the network in messages that are longer, and fewer, by the number of ranks in a node (DeepSpeed-MoE,
    arXiv 2201.05596, section 5.2). Rows go out in the order (receiver's place in its node, node); they arrive as they do by one
    all-to-all.

    Attributes:
        axis: The expert axis: nodes x places.
        inside: Its ranks in this node.
        across: Its ranks at this rank's place in every node.
        sent_inside, received_inside: Rows to and from every rank of ``inside`` on the way out.
        sent_across, received_across: The same of ``across``.
        by_node: The permutation from (sender's place, node) to (node, sender's place).
        by_place: Its inverse.

    """

    axis: Axis
    inside: Axis
    across: Axis
    sent_inside: Sequence[int]
    received_inside: Sequence[int]
    sent_across: Sequence[int]
    received_across: Sequence[int]
    by_node: Tensor
    by_place: Tensor

    @property
    def rows(self) -> int:
        return sum(self.sent_inside)

    def start_out(self, rows: Tensor) -> Tensor:
        rows = all_to_all_rows(rows, self.received_inside, self.sent_inside, self.inside)
        rows = rows.index_select(0, self.by_node)
        return start_all_to_all_rows(rows, self.received_across, self.sent_across, self.across)

    def finish_out(self, pending: Tensor) -> Tensor:
        return wait(pending)

    def start_back(self, rows: Tensor) -> Tensor:
        return start_all_to_all_rows(rows, self.sent_across, self.received_across, self.across)

    def finish_back(self, pending: Tensor) -> Tensor:
        rows = wait(pending).index_select(0, self.by_place)
        return all_to_all_rows(rows, self.sent_inside, self.received_inside, self.inside)
