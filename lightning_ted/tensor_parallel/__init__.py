"""Tensor parallelism of ordinary modules on plain local tensors, driven by name-pattern plans (Megatron-LM, arXiv 1909.08053)."""

from lightning_ted.tensor_parallel.embedding import VocabParallelEmbedding
from lightning_ted.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from lightning_ted.tensor_parallel.loss import VocabParallelCrossEntropyLoss
from lightning_ted.tensor_parallel.plan import STYLES, Style, expand_plan

__all__ = [
    "STYLES",
    "ColumnParallelLinear",
    "RowParallelLinear",
    "Style",
    "VocabParallelCrossEntropyLoss",
    "VocabParallelEmbedding",
    "expand_plan",
]
