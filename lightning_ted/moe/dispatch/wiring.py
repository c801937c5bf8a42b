"""How the ranks of the expert axis are wired together: what they tell each other of sizes, and by what they exchange rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_ted.collectives.exchange import Exchange, FlatExchange, HierarchicalExchange
from lightning_ted.collectives.primitives import all_to_all_rows
from lightning_ted.mesh import Axis
from lightning_ted.moe.dispatch.order import regroup


@dataclass(frozen=True)
class Told:
    """What the ranks have told each other, for each chunk.

    Attributes:
        arrived_CPe: Rows that come here from every rank for each local expert.
        sizes_CX: What :meth:`Wiring.exchange` wants to know on the host.
        detail: What it wants to know on the device.

    """

    arrived_CPe: Tensor
    sizes_CX: Tensor
    detail: Tensor | None = None


class Wiring(Protocol):
    """Exchanges rows between the ranks of the expert axis."""

    @property
    def axis(self) -> Axis:
        """The expert axis."""

    def place(self, expert_TK: Tensor, num_experts: int) -> Tensor:
        """The place of every expert in the order in which rows go out; ``num_experts``, for none, stays."""

    def tell(self, counts_CE: Tensor) -> Told:
        """Tell the other ranks how many rows they will get; ``counts_CE``: by place."""

    def exchange(self, told: Told, chunk: int, sizes: list[int]) -> Exchange:
        """The exchange of the rows of a chunk; ``sizes``: of ``told``."""


@dataclass(frozen=True)
class FlatWiring:
    """Every rank sends to every other one."""

    axis: Axis

    def place(self, expert_TK: Tensor, num_experts: int) -> Tensor:
        return expert_TK

    def tell(self, counts_CE: Tensor) -> Told:
        peers = self.axis.size
        counts_PCe = counts_CE.view(len(counts_CE), peers, -1).transpose(0, 1)
        arrived_PCe = all_to_all_rows(counts_PCe, [1] * peers, [1] * peers, self.axis)
        return Told(arrived_PCe.transpose(0, 1), torch.cat([counts_PCe.sum(2), arrived_PCe.sum(2)]).T)

    def exchange(self, told: Told, chunk: int, sizes: list[int]) -> Exchange:
        return FlatExchange(self.axis, sizes[: self.axis.size], sizes[self.axis.size :])


@dataclass(frozen=True)
class HierarchicalWiring:
    """Every rank sends to those of its node, and to those at its place in other nodes.

    In shapes, V stands for nodes and I for the places in one.
    """

    axis: Axis
    inside: Axis
    across: Axis

    def place(self, expert_TK: Tensor, num_experts: int) -> Tensor:
        places, nodes = self.inside.size, self.across.size
        along_E = torch.arange(num_experts + 1, device=expert_TK.device)
        place_VIe = along_E[:-1].view(places, nodes, -1).transpose(0, 1)
        return torch.cat([place_VIe.reshape(-1), along_E[-1:]])[expert_TK]

    def tell(self, counts_CE: Tensor) -> Told:
        places, nodes, chunks = self.inside.size, self.across.size, len(counts_CE)
        counts_ICVe = counts_CE.view(chunks, places, nodes, -1).transpose(0, 1)
        middle_ICVe = all_to_all_rows(counts_ICVe, [1] * places, [1] * places, self.inside)
        arrived_VCIe = all_to_all_rows(middle_ICVe.transpose(0, 2), [1] * nodes, [1] * nodes, self.across)
        sizes_XC = torch.cat(
            [
                counts_ICVe.sum((2, 3)),
                middle_ICVe.sum((2, 3)),
                middle_ICVe.sum((0, 3)).T,
                arrived_VCIe.sum((2, 3)),
            ]
        )
        arrived_CPe = arrived_VCIe.transpose(0, 1).reshape(chunks, self.axis.size, -1)
        return Told(arrived_CPe, sizes_XC.T, middle_ICVe.sum(3))

    def exchange(self, told: Told, chunk: int, sizes: list[int]) -> Exchange:
        places, nodes = self.inside.size, self.across.size
        sent_inside, received_inside = sizes[:places], sizes[places : 2 * places]
        sent_across, received_across = sizes[2 * places : 2 * places + nodes], sizes[2 * places + nodes :]
        assert told.detail is not None
        by_node, by_place = regroup(told.detail[:, chunk], sum(received_inside))
        return HierarchicalExchange(
            self.axis,
            self.inside,
            self.across,
            sent_inside,
            received_inside,
            sent_across,
            received_across,
            by_node,
            by_place,
        )
