"""What a router decides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_ted.collectives.tape import kept


@dataclass(frozen=True)
class Routing:
    """Which experts take which tokens, and how their outputs are weighed.

    Attributes:
        expert_TK: Expert numbers, int64. ``num_experts`` stands for "none": the choice is not routed.
        weight_TK: Weights of the experts' outputs, differentiable.
        scores_TE: The router's normalised scores, for the load-balancing loss, fp32.
        logits_TE: The router's logits, for the z-loss, fp32.
        may_drop: Whether some choices may be "none", so that the number of routed rows is not simply T * K.

    """

    expert_TK: Tensor
    weight_TK: Tensor
    scores_TE: Tensor
    logits_TE: Tensor
    may_drop: bool = False

    @property
    def num_experts(self) -> int:
        """The number of experts to choose from."""
        return self.logits_TE.shape[-1]


def count_experts(expert_TK: Tensor, num_experts: int) -> Tensor:
    """Number of assignments of each expert ``[E]``, those to "none" left out."""
    flat_N = expert_TK.reshape(-1)
    # Not bincount, which reads its input on the host; one slot more for "none".
    return flat_N.new_zeros(num_experts + 1).scatter_add_(0, flat_N, torch.ones_like(flat_N))[:num_experts]


def keep_choice(choose: Callable[[], Tensor]) -> Tensor:
    """``choose()``, or what it gave in the forward that is being recomputed.

    A router that chooses by this chooses the same experts again when its layer is recomputed, even where the device's
    arithmetic does not repeat itself to the last bit and scores are close.
    """
    return kept("choice", None, "experts", choose)


def read_sizes(sizes: Tensor) -> list[Any]:
    """``sizes.tolist()``: where sizes that depend on routing reach the host, once a layer, and not when it is recomputed."""
    return kept("sizes", None, sizes.shape, sizes.tolist)
