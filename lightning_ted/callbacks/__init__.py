"""Callbacks that watch a run. They read; none of them changes what is trained."""

from lightning_ted.callbacks.expert_load import ExpertLoadMonitor
from lightning_ted.callbacks.throughput import TokenThroughput

__all__ = ["ExpertLoadMonitor", "TokenThroughput"]
