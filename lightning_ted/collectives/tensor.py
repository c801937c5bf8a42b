"""Collectives of tensor parallelism, each a forward and its gradient.

``x`` stands for a tensor that is the same on every tensor rank (replicated), ``x_t`` for rank t's share.

============================  =======================  =========================  ==================================
function                      forward                  gradient                   used
============================  =======================  =========================  ==================================
``copy_to_shards``            ``x``                    ``sum_t dx_t``             before column-parallel weights
``sum_shards``                ``sum_t x_t``            ``dx``                     after row-parallel weights
``gather_features``           ``[x_0 .. x_n]``         slice of ``dx``            after a column-parallel weight
``split_features``            slice of ``x``           ``[dx_0 .. dx_n]``         before a row-parallel weight
``gather_tokens_to_shards``   ``[x_0 .. x_n]``         share of ``sum_t dx_t``    sequence parallel: before column
``sum_shards_to_tokens``      share of ``sum_t x_t``   ``[dx_0 .. dx_n]``         sequence parallel: after row
============================  =======================  =========================  ==================================

The dual of each is another row of the table: ``copy_to_shards`` and ``sum_shards``, ``gather_features`` and
``split_features``, ``gather_tokens_to_shards`` and ``sum_shards_to_tokens``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ted.collectives.primitives import all_gather_rows, all_reduce, all_reduce_, reduce_scatter_rows
from lightning_ted.mesh import Axis


class _CopyToShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad, ctx.axis), None


class _SumShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return all_reduce(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _RowLinear(torch.autograd.Function):
    """``sum_t x_t @ w_t.T`` as one unit: the partial product is summed in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, axis: Axis) -> Tensor:
        ctx.save_for_backward(x, weight)
        return all_reduce_(torch.nn.functional.linear(x, weight), axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        dx = grad @ weight if ctx.needs_input_grad[0] else None
        dw = grad.flatten(0, -2).T @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return dx, dw, None


class _GatherFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _gather(x, -1, [x.shape[-1]] * axis.size, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.chunk(ctx.axis.size, -1)[ctx.axis.rank], None


class _SplitFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.chunk(axis.size, -1)[axis.rank].contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad, -1, [grad.shape[-1]] * ctx.axis.size, ctx.axis), None


class _GatherTokensToShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, sizes: Sequence[int], axis: Axis) -> Tensor:
        ctx.dim, ctx.sizes, ctx.axis = dim, sizes, axis
        return _gather(x, dim, sizes, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _reduce_scatter(grad, ctx.dim, ctx.sizes, ctx.axis), None, None, None


class _SumShardsToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, sizes: Sequence[int], axis: Axis) -> Tensor:
        ctx.dim, ctx.sizes, ctx.axis = dim, sizes, axis
        return _reduce_scatter(x, dim, sizes, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _gather(grad, ctx.dim, ctx.sizes, ctx.axis), None, None, None


def _gather(x: Tensor, dim: int, sizes: Sequence[int], axis: Axis) -> Tensor:
    return all_gather_rows(x.movedim(dim, 0).contiguous(), sizes, axis).movedim(0, dim)


def _reduce_scatter(x: Tensor, dim: int, sizes: Sequence[int], axis: Axis) -> Tensor:
    return reduce_scatter_rows(x.movedim(dim, 0), sizes, axis).movedim(0, dim)


def copy_to_shards(x: Tensor, axis: Axis) -> Tensor:
    """Hand a replicated tensor to sharded weights; their gradients for it are summed."""
    return x if axis.size == 1 else _CopyToShards.apply(x, axis)


def sum_shards(x: Tensor, axis: Axis) -> Tensor:
    """Sum partial results; the sum is replicated."""
    return x if axis.size == 1 else _SumShards.apply(x, axis)


def row_linear(x: Tensor, weight: Tensor, axis: Axis) -> Tensor:
    """``sum_shards(linear(x, weight))`` without a second buffer. ``x``: [..., in/t], ``weight``: [out, in/t]."""
    if axis.size == 1:
        return torch.nn.functional.linear(x, weight)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        return _RowLinear.apply(x, weight, axis)


def gather_features(x: Tensor, axis: Axis) -> Tensor:
    """Concatenate every rank's last dimension; what follows is replicated."""
    return x if axis.size == 1 else _GatherFeatures.apply(x, axis)


def split_features(x: Tensor, axis: Axis) -> Tensor:
    """This rank's share of the last dimension of a replicated tensor."""
    return x if axis.size == 1 else _SplitFeatures.apply(x, axis)


def gather_tokens_to_shards(x: Tensor, dim: int, sizes: Sequence[int], axis: Axis) -> Tensor:
    """Gather split tokens along ``dim`` for sharded weights; ``sizes`` are every rank's lengths."""
    return x if axis.size == 1 else _GatherTokensToShards.apply(x, dim, sizes, axis)


def sum_shards_to_tokens(x: Tensor, dim: int, sizes: Sequence[int], axis: Axis) -> Tensor:
    """Sum partial results and keep this rank's share of the tokens along ``dim``."""
    return x if axis.size == 1 else _SumShardsToTokens.apply(x, dim, sizes, axis)
