"""The part of the mesh that a MoE layer works on."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lightning_ted.mesh import SINGLE, Axis
from lightning_ted.tensor_parallel.sequence import SequenceRegion


@dataclass(frozen=True)
class MoEAxes:
    """Where a MoE layer's tokens and experts are.

    Attributes:
        world, data, tensor: Axes of the tokens.
        expert, expert_tensor: Axes of the experts.
        drop_duplicates: Tensor ranks, which hold the same tokens, each route and dispatch only their share (DTD).
        sequence: The region of sequence parallelism, in which tokens arrive split over the tensor axis already.
        inside, across: The expert axis' ranks in this node, and those at this rank's place in every node.
        dispatcher: The name of the dispatcher.
        overlap_chunks: In how many chunks tokens travel, so that experts compute on one while the next is under way.

    """

    world: Axis
    data: Axis
    tensor: Axis
    expert: Axis
    expert_tensor: Axis
    drop_duplicates: bool = True
    sequence: SequenceRegion | None = None
    inside: Axis = SINGLE
    across: Axis = SINGLE
    dispatcher: str = "all_to_all"
    overlap_chunks: int = 1

    def sending(self, inside: Axis, across: Axis, dispatcher: str, overlap_chunks: int) -> MoEAxes:
        """These axes with another way of sending tokens; themselves, if it is theirs."""
        other = replace(self, inside=inside, across=across, dispatcher=dispatcher, overlap_chunks=overlap_chunks)
        return self if other == self else other

    @property
    def drops(self) -> bool:
        """Whether the layer splits its tokens itself."""
        return self.drop_duplicates and self.sequence is None and self.tensor.size > 1

    @property
    def tokens_are_split(self) -> bool:
        """Whether tensor ranks route different tokens."""
        return self.tensor.size > 1 and (self.drop_duplicates or self.sequence is not None)
