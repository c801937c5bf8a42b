"""The one norm: of the gradient that one process would have.

Every element counts once: a rank adds the squares of what it owns, divided by the number of ranks that own the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ted.collectives.phase import during
from lightning_ted.collectives.primitives import all_reduce_
from lightning_ted.mesh import TEDMesh
from lightning_ted.optim.host import device_numbers


@torch.no_grad()
@during("optimizer")
def global_norm(grads: Sequence[Tensor], shares: Sequence[float], mesh: TEDMesh, device: torch.device) -> Tensor:
    """The 2-norm of the whole gradient, the same on every rank; a 0-dim float64 tensor.

    Every rank has to call it, those that own nothing too.

    Args:
        grads: What this rank owns.
        shares: Of each, one over the number of ranks that own the same.
        mesh: The mesh.
        device: Where the collective takes place.

    """
    squares = torch.zeros((), dtype=torch.double, device=device)
    for dtype in dict.fromkeys(grad.dtype for grad in grads):
        found = [(grad, share) for grad, share in zip(grads, shares, strict=True) if grad.dtype == dtype]
        # A norm in 16 bit would be off by half a percent.
        wide = torch.promote_types(dtype, torch.float32)
        norms = torch.stack(torch._foreach_norm([grad for grad, _ in found], 2, wide)).double()
        weights = device_numbers([share for _, share in found], torch.double, device)
        squares += (norms.square() * weights).sum()
    return all_reduce_(squares, mesh.axis("world")).sqrt()


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """What a gradient of this norm is scaled by, as by :func:`torch.nn.utils.clip_grad_norm_`; not read on the host."""
    return (max_norm / (norm + 1e-6)).clamp_max(1.0)
