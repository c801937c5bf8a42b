"""What can be chosen of how gradients are reduced and optimizers step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingOptions:
    """What the strategy's arguments say about training.

    Attributes:
        zero_stage: 1 shards the optimizers' state, 2 the gradients, too.
        tile_size: Elements of a tile of the optimizer step; None steps all at once.
        offload: Keep masters and state in host memory.
        wide_gradients: Accumulate and reduce the gradients of 16-bit weights in fp32.
        overlap_weights: Let updated weights arrive while the next forward runs.

    """

    zero_stage: int = 1
    tile_size: int | None = 2**24
    offload: bool = False
    wide_gradients: bool = False
    overlap_weights: bool = False
