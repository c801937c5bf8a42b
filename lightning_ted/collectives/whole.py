"""A whole tensor from every rank's part of it: for checkpoints and for looking, never inside a step."""

from __future__ import annotations

from torch import Tensor

from lightning_ted.collectives.primitives import all_gather
from lightning_ted.layout import ParamLayout
from lightning_ted.mesh import TEDMesh


def gather_whole(part: Tensor, layout: ParamLayout, mesh: TEDMesh) -> Tensor:
    """Join the parts of all ranks. Every rank has to call it, and every rank gets the whole tensor."""
    for cut in reversed(layout.cuts):
        part = cut.join(all_gather(part, mesh.axis(cut.axis)).unbind())
    return part
