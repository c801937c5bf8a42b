"""Activation checkpointing: which modules are recomputed in backward, and what of them need not be done again."""

from lightning_ted.recompute.checkpoint import CheckpointMode, RecomputeOptions, checkpointed
from lightning_ted.recompute.regions import check_blocks, checkpoint_blocks

__all__ = ["CheckpointMode", "RecomputeOptions", "check_blocks", "checkpoint_blocks", "checkpointed"]
