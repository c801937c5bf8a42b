"""The one norm: of the gradient that one process would have.

Every element counts once: a rank adds the squares of its part divided by the number of ranks that hold the same part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_ted.collectives.primitives import all_reduce_
from lightning_ted.layout import ParamLayout
from lightning_ted.mesh import TEDMesh


@torch.no_grad()
def global_grad_norm(
    grads_with_layouts: Sequence[tuple[Tensor, ParamLayout]], mesh: TEDMesh, device: torch.device | None = None
) -> Tensor:
    """The 2-norm of the whole gradient, the same on every rank; a 0-dim float64 tensor.

    Every rank has to call it, those without gradients too.
    """
    squares = torch.zeros((), dtype=torch.double, device=device)
    for dtype in dict.fromkeys(grad.dtype for grad, _ in grads_with_layouts):
        found = [(grad, 1 / layout.replication) for grad, layout in grads_with_layouts if grad.dtype == dtype]
        # A norm in 16 bit would be off by half a percent.
        wide = torch.promote_types(dtype, torch.float32)
        norms = torch.stack(torch._foreach_norm([grad for grad, _ in found], 2, wide)).double()
        shares = torch.tensor([share for _, share in found], dtype=torch.double, device=norms.device)
        squares = (norms.square() * shares).sum() + squares.to(norms.device)
    return all_reduce_(squares, mesh.axis("world")).sqrt()


@torch.no_grad()
def clip_by_norm_(
    parameters_with_layouts: Sequence[tuple[Parameter, ParamLayout]],
    max_norm: float,
    mesh: TEDMesh,
    device: torch.device | None = None,
) -> Tensor:
    """Scale gradients in place so that their global norm is at most ``max_norm``; returns the norm before.

    The coefficient is that of :func:`torch.nn.utils.clip_grad_norm_`, and is applied without reading it on the host.
    """
    found = [(p.grad, layout) for p, layout in parameters_with_layouts if p.grad is not None]
    norm = global_grad_norm(found, mesh, device)
    coefficient = (max_norm / (norm + 1e-6)).clamp_max(1.0)
    for dtype in dict.fromkeys(grad.dtype for grad, _ in found):
        # The coefficient keeps 32 bits for gradients of 16.
        wide = coefficient.to(torch.promote_types(dtype, torch.float32))
        torch._foreach_mul_([grad for grad, _ in found if grad.dtype == dtype], wide)
    return norm
