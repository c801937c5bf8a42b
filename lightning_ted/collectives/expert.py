"""Collectives of expert parallelism, each beside its dual. Rows are ``[N, D]``; sizes are exact, never padded.

- ``exchange_rows``: all-to-all; its gradient is the all-to-all with the sizes reversed.
- ``gather_rows_to_shards``: all-gather over expert-tensor ranks that hold different rows; its gradient is a reduce-scatter.
- ``sum_shards_to_rows``: reduce-scatter of the shards' partial outputs; its gradient is an all-gather.

The last two are each other's dual. They replace the paper's all-gather before and all-reduce-then-drop after an expert: a
reduce-scatter is just that, at half the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_ted.collectives.primitives import all_gather_rows, all_to_all_rows, reduce_scatter_rows
from lightning_ted.mesh import Axis


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, received: Sequence[int], sent: Sequence[int], axis: Axis) -> Tensor:
        ctx.received, ctx.sent, ctx.axis = received, sent, axis
        return all_to_all_rows(rows, received, sent, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return all_to_all_rows(grad, ctx.sent, ctx.received, ctx.axis), None, None, None


class _GatherRowsToShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: Sequence[int], axis: Axis) -> Tensor:
        ctx.sizes, ctx.axis = sizes, axis
        return all_gather_rows(rows, sizes, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return reduce_scatter_rows(grad, ctx.sizes, ctx.axis), None, None


class _SumShardsToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: Sequence[int], axis: Axis) -> Tensor:
        ctx.sizes, ctx.axis = sizes, axis
        return reduce_scatter_rows(rows, sizes, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return all_gather_rows(grad, ctx.sizes, ctx.axis), None, None


def exchange_rows(rows: Tensor, received: Sequence[int], sent: Sequence[int], axis: Axis) -> Tensor:
    """Send ``sent[i]`` consecutive rows to rank ``i``; receive ``received[i]`` from it, in rank order."""
    return rows if axis.size == 1 else _ExchangeRows.apply(rows, received, sent, axis)


def gather_rows_to_shards(rows: Tensor, sizes: Sequence[int], axis: Axis) -> Tensor:
    """The rows of all ranks in rank order, ``sizes[i]`` of rank ``i``, for sharded weights."""
    return rows if axis.size == 1 else _GatherRowsToShards.apply(rows, sizes, axis)


def sum_shards_to_rows(rows: Tensor, sizes: Sequence[int], axis: Axis) -> Tensor:
    """The sum of all ranks' partial results for this rank's own rows."""
    return rows if axis.size == 1 else _SumShardsToRows.apply(rows, sizes, axis)
