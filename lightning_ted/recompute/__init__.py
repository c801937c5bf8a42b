"""Activation checkpointing: which modules are recomputed in backward, and what of them need not be done again."""

from lightning_ted.recompute.checkpoint import CheckpointMode, RecomputeOptions, checkpointed
from lightning_ted.recompute.regions import checkpoint_blocks

__all__ = ["CheckpointMode", "RecomputeOptions", "checkpoint_blocks", "checkpointed"]
