"""Callbacks that watch a run, even out the loads of experts, and write models for other libraries."""

from lightning_ted.callbacks.balancing import ExpertBiasBalancing
from lightning_ted.callbacks.communication import CommunicationMonitor
from lightning_ted.callbacks.expert_load import ExpertLoadMonitor
from lightning_ted.callbacks.export import HuggingFaceExport
from lightning_ted.callbacks.throughput import TokenThroughput

__all__ = ["CommunicationMonitor", "ExpertBiasBalancing", "ExpertLoadMonitor", "HuggingFaceExport", "TokenThroughput"]
