"""What a strategy asks of whatever holds experts: a MoE layer of this package, or the experts of a foreign one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable

from torch import nn

from lightning_ted.errors import LayoutError
from lightning_ted.layout import Cut
from lightning_ted.moe.axes import MoEAxes
from lightning_ted.moe.statistics import RoutingStatistics
from lightning_ted.topology import Topology, divisors, listed

#: Under which attribute a foreign module keeps its :class:`ExpertParallelLayer`.
ATTRIBUTE = "expert_parallel"


class ExpertParallelLayer(ABC):
    """Experts that can be shared out over the expert axis, and each cut over the expert-tensor axis.

    Attributes:
        num_experts: Number of experts, of all ranks together.
        axes: Where they are; None while they are all here and whole.

    """

    num_experts: int
    axes: MoEAxes | None

    @property
    @abstractmethod
    def statistics(self) -> RoutingStatistics | None:
        """What the last forward saw on this rank."""

    @abstractmethod
    def end_step(self) -> None:
        """To be called when losses have been computed: lets go of the last forward's graph, and keeps its numbers."""

    @abstractmethod
    def place(self, axes: MoEAxes) -> None:
        """Work on these axes from now on; the weights are cut by the caller."""

    @abstractmethod
    def expert_cuts(self, topology: Topology) -> dict[str, tuple[Cut, ...]]:
        """How the experts' weights are to be cut, by their names in the module that holds the layer."""

    @abstractmethod
    def widths(self) -> tuple[int, ...]:
        """What the expert-tensor degree has to divide: the hidden width, and others that are cut with it."""

    def partial_names(self) -> Iterable[str]:
        """Modules and parameters beside the experts that see only this rank's share of the tokens, once it is placed."""
        return ()

    def shared_expert_names(self) -> Iterable[str]:
        """Ordinary networks inside the layer, which a tensor-parallel plan may cut."""
        return ()

    def check(self, name: str, topology: Topology) -> None:
        """See that the experts can be shared out so.

        Raises:
            LayoutError: Naming the layer and the legal choices.

        """
        if self.num_experts % topology.expert:
            raise LayoutError(
                f"`expert_parallel_size={topology.expert}` does not divide the {self.num_experts} experts of MoE layer '{name}'; "
                f"choose one of {listed(divisors(math.gcd(self.num_experts, topology.world_size // topology.expert_tensor)))}."
            )
        width = math.gcd(*self.widths())
        if width % topology.expert_tensor:
            raise LayoutError(
                f"`expert_tensor_parallel_size={topology.expert_tensor}` does not divide the width {width} of the experts of MoE "
                f"layer '{name}' ({', '.join(map(str, self.widths()))}); choose one of "
                f"{listed(divisors(math.gcd(width, topology.tensor)))}."
            )


def expert_parallel_layers(module: nn.Module) -> dict[str, ExpertParallelLayer]:
    """All of them in a module, by the qualified name of the module that each is, or belongs to."""
    found: dict[str, ExpertParallelLayer] = {}
    for name, child in module.named_modules():
        layer = child if isinstance(child, ExpertParallelLayer) else child.__dict__.get(ATTRIBUTE)
        if isinstance(layer, ExpertParallelLayer):
            found[name] = layer
    return found
