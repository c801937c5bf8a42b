"""How one parameter is cut over the mesh.

A layout speaks of the global tensor and of mesh axes, never of a rank; a rank's part follows from its index on each
axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_ted.errors import LayoutError

Family = Literal["dense", "partial", "expert"]


@dataclass(frozen=True)
class Cut:
    """One tensor dimension shared out over one mesh axis.

    Attributes:
        dim: The tensor dimension.
        axis: The mesh axis: ``"tensor"``, ``"expert"`` or ``"expert_tensor"``.
        degree: Number of ranks on that axis.
        blocks: Lengths of the blocks that make up the dimension, each cut evenly. A fused gate/up projection has two, a
            fused query/key/value projection three; an ordinary dimension has one.

    """

    dim: int
    axis: Literal["tensor", "expert", "expert_tensor"]
    degree: int
    blocks: tuple[int, ...]

    def part(self, tensor: Tensor, index: int) -> Tensor:
        """The part of a full ``tensor`` that belongs to ``index`` on the axis; a view where there is one block."""
        parts = [block.chunk(self.degree, self.dim)[index] for block in tensor.split(self.blocks, self.dim)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The full tensor, from the parts of every index in order."""
        lengths = [block // self.degree for block in self.blocks]
        split = [part.split(lengths, self.dim) for part in parts]
        return torch.cat([piece for block in zip(*split, strict=True) for piece in block], self.dim)


@dataclass(frozen=True)
class ParamLayout:
    """How one parameter or buffer lies on the mesh.

    Attributes:
        name: Qualified name in the LightningModule.
        global_shape: Shape of the whole tensor, as one process would hold it.
        cuts: The dimensions that are shared out, on distinct dimensions and axes.
        family: Over which ranks its gradient is summed. ``"dense"``: the data axis. ``"partial"``: the whole world,
            because each tensor rank saw only its share of the tokens (or of the heads). ``"expert"``: the expert-data
            axis. All are then divided by the data-parallel degree.
        replication: On how many ranks each element lives.

    """

    name: str
    global_shape: tuple[int, ...]
    cuts: tuple[Cut, ...] = ()
    family: Family = "dense"
    replication: int = 1

    def __post_init__(self) -> None:
        for kind, used in (("dimension", [cut.dim for cut in self.cuts]), ("axis", [cut.axis for cut in self.cuts])):
            if len(set(used)) < len(used):
                raise LayoutError(f"'{self.name}' is cut twice on one {kind}: {', '.join(map(str, used))}.")
        for cut in self.cuts:
            if not 0 <= cut.dim < len(self.global_shape):
                raise LayoutError(f"'{self.name}' of shape {self.global_shape} has no dimension {cut.dim} to cut.")
            length = self.global_shape[cut.dim]
            if sum(cut.blocks) != length:
                raise LayoutError(
                    f"dimension {cut.dim} of '{self.name}' has length {length}, not the {sum(cut.blocks)} of its blocks "
                    f"{cut.blocks}."
                )
            for block in cut.blocks:
                if block % cut.degree:
                    raise LayoutError(
                        f"dimension {cut.dim} of '{self.name}' (length {block}) cannot be cut over {cut.degree} ranks of "
                        f"the {cut.axis} axis: {block} is not a multiple of {cut.degree}."
                    )

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of one rank's part."""
        shape = list(self.global_shape)
        for cut in self.cuts:
            shape[cut.dim] //= cut.degree
        return tuple(shape)

    def part(self, full: Tensor, index: Mapping[str, int]) -> Tensor:
        """One rank's part of the ``full`` tensor; ``index`` gives its position on each axis."""
        for cut in self.cuts:
            full = cut.part(full, index[cut.axis])
        return full
