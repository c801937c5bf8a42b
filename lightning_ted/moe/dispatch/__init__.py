"""From routing to experts and back: the only place of a MoE layer that communicates about tokens.

Shape suffixes in this folder, beside those of ``moe``: C chunks of tokens that travel one after the other.
"""

from lightning_ted.moe.axes import MoEAxes
from lightning_ted.moe.dispatch.exchanging import make_flat, make_hierarchical
from lightning_ted.moe.dispatch.interface import (
    Dispatcher,
    ExpertFunction,
    dispatchers,
    find_dispatcher,
    register_dispatcher,
)
from lightning_ted.moe.dispatch.local import LocalDispatcher

__all__ = ["Dispatcher", "ExpertFunction", "dispatchers", "find_dispatcher", "make_dispatcher", "register_dispatcher"]

register_dispatcher("all_to_all", make_flat)
register_dispatcher("hierarchical", make_hierarchical)


def make_dispatcher(axes: MoEAxes | None) -> Dispatcher:
    """The dispatcher that the axes call for; no collective where all experts are here and whole."""
    if axes is None or (axes.expert.size == 1 and axes.expert_tensor.size == 1):
        return LocalDispatcher()
    return find_dispatcher(axes.dispatcher)(axes)
