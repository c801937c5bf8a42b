"""Expert capacity: at most so many assignments an expert, the rest dropped (GShard, arXiv 2006.16668, algorithm 1).

The pool of tokens that share a capacity is one data rank's micro-batch, all its tensor ranks together, so dropping does
not depend on the tensor-parallel degree, on duplicate token dropping or on sequence parallelism.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lightning_ted.collectives.primitives import all_gather, all_gather_rows
from lightning_ted.mesh import Axis
from lightning_ted.moe.axes import MoEAxes
from lightning_ted.moe.routing import Routing


def expert_capacity(tokens: int, num_experts: int, top_k: int, factor: float) -> int:
    """Assignments that one expert takes: ``ceil(tokens * top_k / num_experts * factor)``, at least 1."""
    return max(1, math.ceil(tokens * top_k / num_experts * factor))


def within_capacity(expert_TK: Tensor, num_experts: int, capacity: int) -> Tensor:
    """Which assignments fit: first choices before second choices, earlier tokens before later ones. ``[T, K]``, bool."""
    flat_N = expert_TK.T.reshape(-1)
    order_N = flat_N.argsort(stable=True)
    counts = flat_N.new_zeros(num_experts + 1).scatter_add_(0, flat_N, torch.ones_like(flat_N))
    starts = counts.cumsum(0) - counts
    rank_N = torch.arange(len(flat_N), device=flat_N.device) - starts[flat_N[order_N]]
    keep_N = torch.empty_like(flat_N, dtype=torch.bool)
    keep_N[order_N] = rank_N < capacity
    return keep_N.view(expert_TK.shape[1], -1).T


def limit_to_capacity(
    routing: Routing, num_experts: int, factor: float, sequence: tuple[int, ...], axes: MoEAxes | None
) -> Routing:
    """Replace the assignments that do not fit by "none".

    Args:
        routing: This rank's routing.
        num_experts: Number of experts, which also stands for "none".
        factor: The capacity factor.
        sequence: Shape of this rank's tokens, without their width.
        axes: The layer's axes; where tensor ranks hold different tokens, their choices are gathered first.

    """
    expert_TK = routing.expert_TK
    whole_TK: Tensor = expert_TK
    own: slice | Tensor = slice(None)
    if axes is not None and axes.tokens_are_split:
        whole_TK, own = _gather_choices(expert_TK, sequence, axes.tensor, axes.sequence_split)
    capacity = expert_capacity(whole_TK.shape[0], num_experts, expert_TK.shape[1], factor)
    keep_TK = within_capacity(whole_TK, num_experts, capacity)[own]
    return replace(
        routing,
        expert_TK=expert_TK.masked_fill(~keep_TK, num_experts),
        weight_TK=routing.weight_TK.masked_fill(~keep_TK, 0),
        may_drop=True,
    )


def _gather_choices(
    expert_TK: Tensor, sequence: tuple[int, ...], tensor: Axis, sequence_split: bool
) -> tuple[Tensor, Tensor]:
    """The choices of all tensor ranks in the order of the unsplit tokens, and where this rank's are among them."""
    rows = expert_TK.shape[0]
    batch = math.prod(sequence[:-1]) if sequence_split else 1
    sizes = all_gather(torch.tensor([rows], device=expert_TK.device), tensor).view(-1).tolist()
    gathered = all_gather_rows(expert_TK, sizes, tensor)
    # Positions of the gathered rows, rank by rank, in the unsplit order: sequence parallelism splits every sequence.
    total = sum(sizes) // max(batch, 1)
    starts = [sum(sizes[:rank]) // max(batch, 1) for rank in range(tensor.size)]
    places = []
    for start, size in zip(starts, sizes, strict=True):
        length = size // max(batch, 1)
        along = torch.arange(start, start + length, device=expert_TK.device)
        places.append((torch.arange(batch, device=expert_TK.device)[:, None] * total + along).reshape(-1))
    whole = torch.empty_like(gathered)
    whole[torch.cat(places)] = gathered
    return whole, places[tensor.rank]
