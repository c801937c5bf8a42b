"""Expert capacity: at most so many assignments an expert, the rest dropped (GShard, arXiv 2006.16668, algorithm 1).

The pool of tokens that share a capacity is one data rank's micro-batch, all its tensor ranks together, so dropping does
not depend on the tensor-parallel degree, on duplicate token dropping or on sequence parallelism.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lightning_ted.collectives.tokens import restore, share, shares
from lightning_ted.mesh import SINGLE, Axis
from lightning_ted.moe.routing import Routing, count_experts, keep_choice


def expert_capacity(tokens: int, num_experts: int, top_k: int, factor: float) -> int:
    """Assignments that one expert takes: ``ceil(tokens * top_k / num_experts * factor)``, at least 1."""
    return max(1, math.ceil(tokens * top_k / num_experts * factor))


def within_capacity(expert_TK: Tensor, num_experts: int, capacity: int) -> Tensor:
    """Which assignments fit: first choices before second choices, earlier tokens before later ones. ``[T, K]``, bool."""
    flat_N = expert_TK.T.reshape(-1)
    order_N = flat_N.argsort(stable=True)
    counts_E = count_experts(expert_TK, num_experts + 1)  # "none" as one expert more
    starts_E = counts_E.cumsum(0) - counts_E
    rank_N = torch.arange(len(flat_N), device=flat_N.device) - starts_E[flat_N[order_N]]
    keep_N = torch.empty_like(flat_N, dtype=torch.bool)
    keep_N[order_N] = rank_N < capacity
    return keep_N.view(expert_TK.shape[1], -1).T


def limit_to_capacity(
    routing: Routing, num_experts: int, factor: float, length: int, batch: int = 1, tensor: Axis = SINGLE
) -> Routing:
    """Replace the assignments that do not fit by "none".

    Args:
        routing: This rank's routing.
        num_experts: Number of experts, which also stands for "none".
        factor: The capacity factor.
        length: Tokens of a sequence, those of all ranks of ``tensor`` together.
        batch: Sequences, of each of which this rank holds a share.
        tensor: The axis that shares out the tokens.

    """
    expert_TK = routing.expert_TK
    choices = expert_TK.shape[1]
    mine = shares(length, tensor.size)[tensor.rank]

    def fitting() -> Tensor:
        whole_TK = restore(expert_TK.view(batch, mine, choices), length, tensor, dim=1).reshape(-1, choices)
        capacity = expert_capacity(whole_TK.shape[0], num_experts, choices, factor)
        keep_TK = within_capacity(whole_TK, num_experts, capacity)
        return share(keep_TK.reshape(batch, length, choices), 1, tensor).reshape(-1, choices)

    keep_TK = keep_choice(fitting)
    return replace(
        routing,
        expert_TK=expert_TK.masked_fill(~keep_TK, num_experts),
        weight_TK=routing.weight_TK.masked_fill(~keep_TK, 0),
        may_drop=True,
    )
