"""Callbacks that watch a run. They read; none of them changes what is trained."""

from lightning_ted.callbacks.communication import CommunicationMonitor
from lightning_ted.callbacks.expert_load import ExpertLoadMonitor
from lightning_ted.callbacks.throughput import TokenThroughput

__all__ = ["CommunicationMonitor", "ExpertLoadMonitor", "TokenThroughput"]
