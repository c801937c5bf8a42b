"""Callbacks that watch a run, and one that evens out the loads of experts."""

from lightning_ted.callbacks.balancing import ExpertBiasBalancing
from lightning_ted.callbacks.communication import CommunicationMonitor
from lightning_ted.callbacks.expert_load import ExpertLoadMonitor
from lightning_ted.callbacks.throughput import TokenThroughput

__all__ = ["CommunicationMonitor", "ExpertBiasBalancing", "ExpertLoadMonitor", "TokenThroughput"]
