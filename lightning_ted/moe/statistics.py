"""What one forward of a MoE layer saw."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoutingStatistics:
    """What one forward of one layer saw on this rank.

    Attributes:
        counts_E: Assignments of each expert, before capacity.
        scores_E: Sum over tokens of the router's scores, differentiable.
        z: Sum over tokens of the squared log-sum-exp of the logits, differentiable.
        dropped: Assignments dropped by capacity.
        tokens: Number of tokens.
        top_k: Choices per token.
        is_finished: Whether the graph has been let go, because all losses have been computed.

    """

    counts_E: Tensor
    scores_E: Tensor
    z: Tensor
    dropped: Tensor
    tokens: int
    top_k: int
    is_finished: bool = False

    def finished(self) -> RoutingStatistics:
        """The same numbers without their graph."""
        return replace(self, scores_E=self.scores_E.detach(), z=self.z.detach(), is_finished=True)

    def packed(self) -> Tensor:
        """All sums as one vector ``[2 E + 3]``: counts, scores, z, dropped, tokens."""
        tokens = self.scores_E.new_full((1,), self.tokens)  # filled on the device, not copied to it
        return torch.cat(
            [
                self.counts_E.to(self.scores_E.dtype),
                self.scores_E,
                self.z.view(1),
                self.dropped.view(1).to(tokens),
                tokens,
            ]
        )
