"""Tensor + expert + data parallel training of mixture-of-experts models, as a Lightning strategy.

The front door: names only, each imported when it is first used, so that ``import lightning_ted`` loads neither torch
nor Lightning. It makes ``Trainer(strategy="ted")`` known, whichever of the two packages is imported first.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_ted.strategy.registry import register_lazily

if TYPE_CHECKING:
    from lightning_ted.adapters import MoESpec as MoESpec
    from lightning_ted.adapters import from_pretrained as from_pretrained
    from lightning_ted.adapters import register_moe_adapter as register_moe_adapter
    from lightning_ted.callbacks import CommunicationMonitor as CommunicationMonitor
    from lightning_ted.callbacks import ExpertLoadMonitor as ExpertLoadMonitor
    from lightning_ted.callbacks import TokenThroughput as TokenThroughput
    from lightning_ted.moe import MoE as MoE
    from lightning_ted.moe import TopKRouter as TopKRouter
    from lightning_ted.moe import auxiliary_loss as auxiliary_loss
    from lightning_ted.moe import expert_counts as expert_counts
    from lightning_ted.strategy.ted import TEDStrategy as TEDStrategy
    from lightning_ted.topology import Topology as Topology

__version__ = "0.1.0"

_HOME = {
    "TEDStrategy": "lightning_ted.strategy.ted",
    "MoE": "lightning_ted.moe",
    "TopKRouter": "lightning_ted.moe",
    "auxiliary_loss": "lightning_ted.moe",
    "expert_counts": "lightning_ted.moe",
    "CommunicationMonitor": "lightning_ted.callbacks",
    "ExpertLoadMonitor": "lightning_ted.callbacks",
    "TokenThroughput": "lightning_ted.callbacks",
    "Topology": "lightning_ted.topology",
    "MoESpec": "lightning_ted.adapters",
    "from_pretrained": "lightning_ted.adapters",
    "register_moe_adapter": "lightning_ted.adapters",
}

__all__ = [
    "CommunicationMonitor",
    "ExpertLoadMonitor",
    "MoE",
    "MoESpec",
    "TEDStrategy",
    "TokenThroughput",
    "TopKRouter",
    "Topology",
    "auxiliary_loss",
    "expert_counts",
    "from_pretrained",
    "register_moe_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


register_lazily()
