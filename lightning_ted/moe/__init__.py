"""Mixture-of-experts layers.

Shape suffixes in this folder: T tokens, D model width, F expert hidden width, E experts, e local experts, K choices per
token, N routed assignments (rows), L layers, P peers on the expert axis, S sources of rows.
"""

from lightning_ted.moe.activations import swiglu
from lightning_ted.moe.experts import Experts
from lightning_ted.moe.layer import MoE
from lightning_ted.moe.losses import auxiliary_loss, drop_rate, expert_counts
from lightning_ted.moe.router import TopKRouter
from lightning_ted.moe.routing import Routing
from lightning_ted.moe.statistics import RoutingStatistics

__all__ = [
    "Experts",
    "MoE",
    "Routing",
    "RoutingStatistics",
    "TopKRouter",
    "auxiliary_loss",
    "drop_rate",
    "expert_counts",
    "swiglu",
]
