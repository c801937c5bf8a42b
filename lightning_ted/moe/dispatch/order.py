"""Tokens in the order of their experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ted.moe.routing import count_experts


@dataclass(frozen=True)
class Order:
    """The assignments of a batch of tokens, sorted by chunk of tokens and then by expert.

    Attributes:
        order_N: Assignment (token * K + choice) of every row; those that are not routed come last.
        position_TK: Row of every assignment: the inverse of ``order_N``.
        counts_CE: Rows of each chunk and expert.
        may_drop: Whether some assignments may not be routed.

    """

    order_N: Tensor
    position_TK: Tensor
    counts_CE: Tensor
    may_drop: bool = False

    @classmethod
    def of(cls, expert_TK: Tensor, num_experts: int, may_drop: bool = False, chunks: int = 1) -> Order:
        """Sort the assignments, keeping the order of the tokens within an expert. Chunks are as even as can be."""
        key_TK, keys = expert_TK, num_experts * chunks
        if chunks > 1:
            tokens = expert_TK.shape[0]
            chunk_T = torch.arange(tokens, device=expert_TK.device) * chunks // max(tokens, 1)
            key_TK = expert_TK + num_experts * chunk_T.unsqueeze(1)
            if may_drop:
                key_TK = key_TK.masked_fill(expert_TK == num_experts, keys)
        order_N = key_TK.reshape(-1).argsort(stable=True)
        position_N = torch.empty_like(order_N)
        position_N[order_N] = torch.arange(len(order_N), device=order_N.device)
        counts_CE = count_experts(key_TK, keys).view(chunks, num_experts)
        return cls(order_N, position_N.view(expert_TK.shape), counts_CE, may_drop)


def regroup(chunks_SG: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The permutation from the order (source, then group) to (group, then source), and its inverse.

    Args:
        chunks_SG: Rows by source and group.
        rows: Their sum.

    """

    def starts(lengths: Tensor) -> Tensor:
        return lengths.reshape(-1).cumsum(0) - lengths.reshape(-1)

    chunks_GS = chunks_SG.T
    arrival_SG = starts(chunks_SG).view_as(chunks_SG)
    grouped_GS = starts(chunks_GS).view_as(chunks_GS)
    shift_GS = arrival_SG.T - grouped_GS
    along = torch.arange(rows, device=chunks_SG.device)
    index = along + shift_GS.reshape(-1).repeat_interleave(chunks_GS.reshape(-1), output_size=rows)
    inverse = along - shift_GS.T.reshape(-1).repeat_interleave(chunks_SG.reshape(-1), output_size=rows)
    return index, inverse
