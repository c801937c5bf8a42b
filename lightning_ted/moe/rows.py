"""Moving rows between token order and expert order: gathers in both directions.

A scatter-add would sum in an order that depends on which rank holds which expert, and needs atomics on a GPU. Here the
gradient of every gather is a gather by the inverse permutation, so results do not depend on the layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _ExpandTokens(torch.autograd.Function):
    """``rows[n] = tokens[order[n] // K]``; gradient: ``dtokens[t] = sum_k drows[position[t, k]]``."""

    @staticmethod
    def forward(ctx: Any, tokens_TD: Tensor, order_N: Tensor, position_TK: Tensor, routed: int) -> Tensor:
        ctx.save_for_backward(position_TK)
        ctx.routed = routed
        return tokens_TD.index_select(0, order_N[:routed] // position_TK.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None, None]:
        (position_TK,) = ctx.saved_tensors
        tokens, choices = position_TK.shape
        if choices == 1 and ctx.routed == tokens:
            return grad_ND.index_select(0, position_TK.view(-1)), None, None, None
        picked_TKD = _pick(grad_ND, position_TK, ctx.routed)
        return picked_TKD.sum(1), None, None, None


class _CombineRows(torch.autograd.Function):
    """``out[t] = sum_k weight[t, k] * rows[position[t, k]]``, choices that are not routed counting nothing."""

    @staticmethod
    def forward(
        ctx: Any, rows_ND: Tensor, weight_TK: Tensor, order_N: Tensor, position_TK: Tensor, routed: int
    ) -> Tensor:
        picked_TKD = _pick(rows_ND, position_TK, routed)
        weight_TK = weight_TK.to(rows_ND.dtype)
        ctx.save_for_backward(picked_TKD, weight_TK, order_N)
        ctx.routed = routed
        # In place: a view that a Function returns may not be changed in place by whoever gets it.
        return torch.bmm(weight_TK.unsqueeze(1), picked_TKD).squeeze_(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        picked_TKD, weight_TK, order_N = ctx.saved_tensors
        order_N = order_N[: ctx.routed]
        grad_weight_TK = torch.bmm(picked_TKD, grad_TD.unsqueeze(2)).squeeze(2)
        rows = grad_TD.index_select(0, order_N // weight_TK.shape[1])
        return rows.mul_(weight_TK.view(-1).index_select(0, order_N).unsqueeze(1)), grad_weight_TK, None, None, None


class _PermuteRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


def _pick(rows_ND: Tensor, position_TK: Tensor, routed: int) -> Tensor:
    """``rows[position]`` as ``[T, K, D]``, zeros for positions from ``routed`` on."""
    shape = (*position_TK.shape, rows_ND.shape[1])
    position = position_TK.view(-1)
    if routed == position.numel():
        return rows_ND.index_select(0, position).view(shape)
    if routed == 0:
        return rows_ND.new_zeros(shape)
    picked = rows_ND.index_select(0, position.clamp_max(routed - 1))
    return picked.masked_fill_((position >= routed).unsqueeze(1), 0).view(shape)


def expand_tokens(tokens_TD: Tensor, order_N: Tensor, position_TK: Tensor, routed: int) -> Tensor:
    """One row per routed assignment, in expert order: ``[T, D] -> [routed, D]``."""
    return _ExpandTokens.apply(tokens_TD, order_N, position_TK, routed)


def combine_rows(rows_ND: Tensor, weight_TK: Tensor, order_N: Tensor, position_TK: Tensor, routed: int) -> Tensor:
    """The weighted sum of every token's rows: ``[routed, D] -> [T, D]``."""
    return _CombineRows.apply(rows_ND, weight_TK, order_N, position_TK, routed)


def permute_rows(rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """``rows[index]``, ``inverse`` being the permutation that undoes it."""
    return _PermuteRows.apply(rows, index, inverse)
