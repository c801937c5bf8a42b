"""Which rank sits where: the integer arithmetic behind every process group.

The same ranks are arranged twice (arXiv 2303.06318, eq. 1, with the expert-tensor degree set free):

* non-expert layers see ``data x tensor``: ``rank = tensor_index + tensor * data_index``;
* expert layers see ``expert_data x expert x expert_tensor``, the expert-tensor index running fastest.

``tensor * data == expert_tensor * expert * expert_data == world_size`` always holds. Only integers live here, so that the
planner can reason about thousands of ranks without torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_ted.errors import LayoutError

RankOrder = Literal["expert_first", "data_first"]
AxisName = Literal["world", "data", "tensor", "expert_data", "expert", "expert_tensor"]

AXIS_NAMES: tuple[AxisName, ...] = get_args(AxisName)


def divisors(number: int) -> list[int]:
    """All positive divisors of ``number``, in ascending order."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def listed(choices: list[int]) -> str:
    """``[1, 2, 4]`` as ``"1, 2, 4"``, for error messages."""
    return ", ".join(map(str, choices))


@dataclass(frozen=True)
class Coordinates:
    """Where one rank sits on each axis."""

    data: int
    tensor: int
    expert_data: int
    expert: int
    expert_tensor: int


@dataclass(frozen=True)
class Topology:
    """The arrangement of ``world_size`` ranks on the tensor, data, expert, expert-data and expert-tensor axes.

    Args:
        world_size: Number of ranks.
        tensor: Tensor-parallel degree of the non-expert layers (``G_t`` of the paper).
        expert: Expert-parallel degree (``G_e``).
        expert_tensor: Tensor-parallel degree inside an expert; a divisor of ``tensor``. ``tensor`` itself is the
            paper's scheme, 1 folds the tensor axis into the expert axes.
        order: ``"expert_first"`` (E+D) places the members of an expert group on neighbouring ranks, ``"data_first"``
            (D+E) the replicas of an expert.

    Raises:
        LayoutError: If the degrees do not divide each other; the message lists the legal choices.

    """

    world_size: int
    tensor: int = 1
    expert: int = 1
    expert_tensor: int = 1
    order: RankOrder = "expert_first"

    def __post_init__(self) -> None:
        if self.order not in get_args(RankOrder):
            raise LayoutError(
                f"`rank_order={self.order!r}` is unknown; choose one of {', '.join(get_args(RankOrder))}."
            )
        self._check_divides("world_size", self.world_size, 1, "")
        self._check_divides(
            "tensor_parallel_size", self.tensor, self.world_size, f"the world size {self.world_size} (nodes x devices)"
        )
        self._check_divides(
            "expert_tensor_parallel_size", self.expert_tensor, self.tensor, f"`tensor_parallel_size={self.tensor}`"
        )
        lanes = self.world_size // self.expert_tensor
        self._check_divides(
            "expert_parallel_size",
            self.expert,
            lanes,
            f"{lanes} (the world size {self.world_size} / `expert_tensor_parallel_size={self.expert_tensor}`)",
        )

    @staticmethod
    def _check_divides(argument: str, value: int, whole: int, described: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise LayoutError(f"`{argument}={value!r}` must be a positive whole number.")
        if described and whole % value:
            raise LayoutError(
                f"`{argument}={value}` does not divide {described}; choose one of {listed(divisors(whole))}."
            )

    @property
    def data(self) -> int:
        """Data-parallel degree of the non-expert layers: how many different batches are in flight."""
        return self.world_size // self.tensor

    @property
    def expert_data(self) -> int:
        """How many replicas each expert shard has."""
        return self.world_size // (self.expert * self.expert_tensor)

    def size(self, axis: AxisName) -> int:
        """Number of ranks in one group of ``axis``."""
        if axis == "world":
            return self.world_size
        return getattr(self, axis)

    def coordinates(self, rank: int) -> Coordinates:
        """Where ``rank`` sits on each axis.

        Raises:
            LayoutError: If ``rank`` is not in ``range(world_size)``.

        """
        if not 0 <= rank < self.world_size:
            raise LayoutError(f"rank {rank} is outside the world of {self.world_size} ranks.")
        data, tensor = divmod(rank, self.tensor)
        slow_fast, expert_tensor = divmod(rank, self.expert_tensor)
        if self.order == "expert_first":
            expert_data, expert = divmod(slow_fast, self.expert)
        else:
            expert, expert_data = divmod(slow_fast, self.expert_data)
        return Coordinates(data, tensor, expert_data, expert, expert_tensor)

    def group(self, axis: AxisName, rank: int) -> tuple[int, ...]:
        """The ranks that share ``rank``'s group of ``axis``, in the order of their index on it."""
        at = self.coordinates(rank)
        if axis == "world":
            return tuple(range(self.world_size))
        if axis == "data":
            return tuple(range(at.tensor, self.world_size, self.tensor))
        if axis == "tensor":
            start = at.data * self.tensor
            return tuple(range(start, start + self.tensor))
        if axis == "expert":
            return tuple(self._expert_rank(at.expert_data, e, at.expert_tensor) for e in range(self.expert))
        if axis == "expert_data":
            return tuple(self._expert_rank(d, at.expert, at.expert_tensor) for d in range(self.expert_data))
        if axis == "expert_tensor":
            return tuple(self._expert_rank(at.expert_data, at.expert, t) for t in range(self.expert_tensor))
        raise LayoutError(f"axis {axis!r} is unknown; choose one of {', '.join(AXIS_NAMES)}.")

    def groups(self, axis: AxisName) -> tuple[tuple[int, ...], ...]:
        """Every group of ``axis``, each rank in exactly one of them, ordered by their first rank."""
        found: list[tuple[int, ...]] = []
        placed: set[int] = set()
        for rank in range(self.world_size):
            if rank not in placed:
                found.append(self.group(axis, rank))
                placed.update(found[-1])
        return tuple(found)

    def node_groups(self, axis: AxisName, rank: int, ranks_per_node: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of ``rank``'s group of ``axis``, the ranks in its node, and those at its place in every node.

        Args:
            axis: The axis.
            rank: The rank.
            ranks_per_node: Consecutive ranks that share a node.

        Raises:
            LayoutError: If the group has not the same number of ranks in each of its nodes.

        """
        ranks = self.group(axis, rank)
        nodes = [other // ranks_per_node for other in ranks]
        inside = tuple(other for other in ranks if other // ranks_per_node == rank // ranks_per_node)
        counts = {nodes.count(node) for node in nodes}
        if len(counts) > 1:
            raise LayoutError(
                f"`moe_dispatcher='hierarchical'` needs as many ranks of an {axis}-parallel group in each of its nodes, but ranks "
                f"{list(ranks)} lie unevenly on nodes of {ranks_per_node}; choose an `{axis}_parallel_size` that divides the "
                f"{ranks_per_node} devices of a node or is a multiple of them, or `moe_dispatcher='all_to_all'`."
            )
        return inside, ranks[inside.index(rank) :: len(inside)]

    def _expert_rank(self, expert_data: int, expert: int, expert_tensor: int) -> int:
        if self.order == "expert_first":
            return expert_tensor + self.expert_tensor * (expert + self.expert * expert_data)
        return expert_tensor + self.expert_tensor * (expert_data + self.expert_data * expert)
