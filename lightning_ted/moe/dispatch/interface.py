"""What a MoE layer asks of a dispatcher, and by which names dispatchers are chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from lightning_ted.errors import TEDError
from lightning_ted.moe.axes import MoEAxes
from lightning_ted.moe.routing import Routing

#: Rows in expert order ``[N, D]``, rows of each local expert, the same on the host where it is known already, and whether anybody
#: reads the values of what is returned.
ExpertFunction = Callable[[Tensor, Tensor, list[int] | None, bool], Tensor]


class Dispatcher(Protocol):
    """Brings tokens to their experts and back: it owns their order, sizes and communication.

    A layer makes its dispatcher once. What it communicates, it takes through :func:`lightning_ted.collectives.tape.kept`, and sizes
    that it reads on the host through :func:`lightning_ted.moe.routing.read_sizes`; otherwise a recomputation does both again.
    """

    def __call__(
        self, tokens_TD: Tensor, routing: Routing, experts: ExpertFunction, beside: Callable[[], None]
    ) -> Tensor:
        """``[T, D]`` through the experts, weighed and summed: ``[T, D]``, differentiable.

        Args:
            tokens_TD: This rank's tokens.
            routing: Their experts, of those of all ranks, and weights.
            experts: This rank's experts. Where their hidden width is cut, what they return is a partial result.
            beside: Other work of the layer, to be done once, while tokens are under way.

        """


#: Makes the dispatcher of a layer on more than one rank.
DispatcherFactory = Callable[[MoEAxes], Dispatcher]

_DISPATCHERS: dict[str, DispatcherFactory] = {}


def register_dispatcher(name: str, factory: DispatcherFactory) -> None:
    """Make a dispatcher available as ``TEDStrategy(moe_dispatcher=name)``.

    Raises:
        TEDError: If the name is taken.

    """
    if _DISPATCHERS.setdefault(name, factory) is not factory:
        raise TEDError(f"`name={name!r}` is the name of another dispatcher; choose one that is not of {dispatchers()}.")


def dispatchers() -> tuple[str, ...]:
    """The names of all dispatchers."""
    return tuple(_DISPATCHERS)


def find_dispatcher(name: str) -> DispatcherFactory:
    """The dispatcher of a name.

    Raises:
        TEDError: If there is none.

    """
    if name not in _DISPATCHERS:
        raise TEDError(f"`moe_dispatcher={name!r}` is unknown; choose one of {', '.join(map(repr, dispatchers()))}.")
    return _DISPATCHERS[name]
