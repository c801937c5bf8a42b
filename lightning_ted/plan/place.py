"""One rank of a layout: its axes, and its share of the tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from lightning_ted.errors import LayoutError
from lightning_ted.plan.options import Options
from lightning_ted.plan.traffic import Ring
from lightning_ted.topology import AxisName, Topology

#: Over which ranks a gradient is summed: the data axis, the world, or the expert-data axis.
Family = Literal["dense", "partial", "expert"]


@dataclass(frozen=True)
class Weight:
    """One parameter, on one rank.

    Attributes:
        size: Elements that the rank holds.
        family: Over which ranks its gradient is summed.

    """

    size: int
    family: Family


def shares(length: int, parts: int) -> list[int]:
    """``length`` shared out as evenly as can be, the first parts taking one more: ``shares(7, 3) == [3, 2, 2]``."""
    return [(length + parts - 1 - index) // parts for index in range(parts)]


@dataclass(frozen=True)
class Place:
    """Where one rank is, and what it does there.

    Attributes:
        topology: The layout.
        options: How the model is trained.
        rank: The rank.
        in_stack: Whether the part that is looked at lies in a stack of blocks.

    """

    topology: Topology
    options: Options
    rank: int = 0
    in_stack: bool = False

    def in_a_stack(self) -> Place:
        """The same within a stack."""
        return replace(self, in_stack=True)

    def ring(self, axis: AxisName) -> Ring:
        """This rank's group on an axis."""
        at = self.topology.coordinates(self.rank)
        return Ring(axis, self.topology.size(axis), self.rank if axis == "world" else getattr(at, axis))

    @cached_property
    def tensor(self) -> Ring:
        """The tensor axis."""
        return self.ring("tensor")

    @property
    def splits_sequences(self) -> bool:
        """Whether hidden states are split over tokens here."""
        return self.in_stack and self.options.sequence_parallel and self.topology.tensor > 1

    @property
    def drops(self) -> bool:
        """Whether a MoE layer shares out its tokens itself (duplicate token dropping)."""
        return self.options.duplicate_token_dropping and not self.splits_sequences and self.topology.tensor > 1

    @property
    def tokens_are_split(self) -> bool:
        """Whether tensor ranks route different tokens."""
        return self.drops or self.splits_sequences

    @property
    def tokens(self) -> int:
        """Tokens of a data-parallel rank's micro-batch."""
        return self.options.micro_batch * self.options.sequence_length

    @property
    def own_tokens(self) -> int:
        """Of these, those whose hidden states this rank holds between layers."""
        if not self.splits_sequences:
            return self.tokens
        return self.options.micro_batch * self._share(self.options.sequence_length, self.rank)

    def routed_tokens(self, rank: int) -> int:
        """Tokens that a rank's router sees in a MoE layer."""
        if self.splits_sequences:
            return self.options.micro_batch * self._share(self.options.sequence_length, rank)
        return self._share(self.tokens, rank) if self.drops else self.tokens

    @property
    def whole_family(self) -> Family:
        """The family of parameters that are not cut: where hidden states are split, each rank has a part of the gradient."""
        return "partial" if self.splits_sequences else "dense"

    def _share(self, length: int, rank: int) -> int:
        size = self.topology.tensor
        return (length + size - 1 - rank % size) // size

    def over(self, axis: AxisName, number: int, described: str) -> int:
        """``number`` over the ranks of an axis.

        Raises:
            LayoutError: If they do not divide it.

        """
        size = self.topology.size(axis)
        if number % size:
            raise LayoutError(f"`{axis}_parallel_size={size}` does not divide {described}, {number}.")
        return number // size
