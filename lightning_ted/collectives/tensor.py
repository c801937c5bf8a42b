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
============================  =======================  =========================  ==================================

``copy_to_shards`` and ``sum_shards`` are each other's dual, and so are ``gather_features`` and ``split_features``. A
row-parallel linear layer is one unit with the collective that follows it: ``row_linear`` sums what it makes, and
``row_linear_to_tokens``, the dual of ``gather_tokens_to_shards``, leaves each rank its share of the sum.

Gradients can be taken once; a second derivative would need collectives of its own, and is refused by torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ted.collectives.phase import dual
from lightning_ted.collectives.primitives import all_gather_dim, all_reduce, all_reduce_, reduce_scatter_dim, signature
from lightning_ted.collectives.tape import kept
from lightning_ted.mesh import Axis


class _CopyToShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    @dual
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad, ctx.axis), None


class _SumShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return all_reduce(x, axis)

    @staticmethod
    @dual
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _RowLinear(torch.autograd.Function):
    """``sum_t x_t @ w_t.T`` as one unit: the partial product is summed in place, and not made again in a recomputation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, axis: Axis) -> Tensor:
        _save_linear(ctx, x, weight)
        # A compiler cannot functionalise the operator that sums in place, and reuses buffers by itself.
        reduce = all_reduce if torch.compiler.is_compiling() else all_reduce_
        return kept("all_reduce", axis, signature(x), lambda: reduce(F.linear(x, weight), axis))

    @staticmethod
    @dual
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        return *_linear_gradients(ctx, grad), None


class _RowLinearToTokens(torch.autograd.Function):
    """The same, of whose sum each rank keeps its share of the tokens, along dimension -2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sizes: Sequence[int], axis: Axis) -> Tensor:
        _save_linear(ctx, x, weight)
        ctx.sizes, ctx.axis = sizes, axis
        return kept(
            "reduce_scatter",
            axis,
            signature(x),
            lambda: reduce_scatter_dim(F.linear(x, weight), x.dim() - 2, sizes, axis),
        )

    @staticmethod
    @dual
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        return *_linear_gradients(ctx, all_gather_dim(grad, grad.dim() - 2, ctx.sizes, ctx.axis)), None, None


def _save_linear(ctx: Any, x: Tensor, weight: Tensor) -> None:
    """Keep of the input and the weight of a linear layer what the gradient of the other one needs."""
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)


def _linear_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the saved input and weight of a linear layer."""
    x, weight = ctx.saved_tensors
    dx = grad @ weight if ctx.needs_input_grad[0] else None
    dw = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
    return dx, dw


class _GatherFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather_dim(x, -1, [x.shape[-1]] * axis.size, axis)

    @staticmethod
    @dual
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.chunk(ctx.axis.size, -1)[ctx.axis.rank], None


class _SplitFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.chunk(axis.size, -1)[axis.rank].contiguous()

    @staticmethod
    @dual
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather_dim(grad, -1, [grad.shape[-1]] * ctx.axis.size, ctx.axis), None


class _GatherTokensToShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, sizes: Sequence[int], axis: Axis) -> Tensor:
        ctx.dim, ctx.sizes, ctx.axis = dim, sizes, axis
        return all_gather_dim(x, dim, sizes, axis)

    @staticmethod
    @dual
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return reduce_scatter_dim(grad, ctx.dim, ctx.sizes, ctx.axis), None, None, None


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which autocast would hand ``x`` to a matrix multiplication; its own where that is disabled."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or not x.is_floating_point() or x.dtype == torch.float64:
        return x.dtype
    return torch.get_autocast_dtype(kind)


def to_autocast(x: Tensor) -> Tensor:
    """``x`` in its :func:`autocast_dtype`, so that what is sent for a matrix multiplication has it, too."""
    return x.to(autocast_dtype(x))


def copy_to_shards(x: Tensor, axis: Axis) -> Tensor:
    """Hand a replicated tensor to sharded weights; their gradients for it are summed."""
    return x if axis.size == 1 else _CopyToShards.apply(x, axis)


def sum_shards(x: Tensor, axis: Axis) -> Tensor:
    """Sum partial results; the sum is replicated."""
    return x if axis.size == 1 else _SumShards.apply(x, axis)


def row_linear(x: Tensor, weight: Tensor, axis: Axis) -> Tensor:
    """``sum_shards(linear(x, weight))`` without a second buffer. ``x``: [..., in/t], ``weight``: [out, in/t]."""
    if axis.size == 1:
        return F.linear(x, weight)
    x, weight = to_autocast(x), to_autocast(weight)
    with torch.autocast(x.device.type, enabled=False):
        return _RowLinear.apply(x, weight, axis)


def row_linear_to_tokens(x: Tensor, weight: Tensor, sizes: Sequence[int], axis: Axis) -> Tensor:
    """``sum_shards_to_tokens(linear(x, weight), dim=-2)`` as one unit; ``sizes`` are every rank's tokens."""
    if axis.size == 1:
        return F.linear(x, weight)
    x, weight = to_autocast(x), to_autocast(weight)
    with torch.autocast(x.device.type, enabled=False):
        return _RowLinearToTokens.apply(x, weight, sizes, axis)


def gather_features(x: Tensor, axis: Axis) -> Tensor:
    """Concatenate every rank's last dimension; what follows is replicated."""
    return x if axis.size == 1 else _GatherFeatures.apply(x, axis)


def split_features(x: Tensor, axis: Axis) -> Tensor:
    """This rank's share of the last dimension of a replicated tensor."""
    return x if axis.size == 1 else _SplitFeatures.apply(x, axis)


def gather_tokens_to_shards(x: Tensor, dim: int, sizes: Sequence[int], axis: Axis) -> Tensor:
    """Gather split tokens along ``dim`` for sharded weights; ``sizes`` are every rank's lengths."""
    return x if axis.size == 1 else _GatherTokensToShards.apply(x, dim, sizes, axis)
