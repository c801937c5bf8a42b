"""Whether replicated parameters get the same gradients on all tensor ranks: if not, the plan has forgotten them.

A replicated weight that sees split features (a norm over the heads of one rank) has only a part of its gradient on each
tensor rank. Nothing fails: the ranks' copies drift apart. So gradients are compared in the first steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_ted.collectives.primitives import all_extremes, all_reduce_
from lightning_ted.errors import PlanError
from lightning_ted.layout import ParamLayout
from lightning_ted.mesh import TEDMesh

#: Difference of a replicated parameter's gradients on tensor ranks, relative to their norm, above which its plan is wrong.
REPLICA_TOLERANCE = 1e-3
#: A gradient whose norm is smaller than this, relative to the largest, may be rounding noise: too small to tell.
_NOISE = 1e-2
#: Sums over consecutive elements by which gradients are compared.
_CHUNKS = 64
#: After so many passes without a gradient to tell by, a parameter is not looked at any more.
_PATIENCE = 16


class ReplicaAudit:
    """Compares the gradients of replicated parameters over the tensor ranks, until each has had one to compare.

    The first gradient may be zero everywhere (behind a projection that is initialised with zeros), so a parameter is looked
    at again until its gradient stands out of the noise, but not for ever, as the verdict is read on the host.

    Args:
        mesh: The mesh.
        layouts: Qualified parameter name to layout.

    Attributes:
        is_pending: Whether there may be something to compare.
        tell: Called with the names of parameters whose gradients differ; by default, it raises a :class:`PlanError`.

    """

    def __init__(self, mesh: TEDMesh, layouts: Mapping[str, ParamLayout]) -> None:
        self._mesh = mesh
        self._layouts = layouts
        self._looks: Counter[str] = Counter()
        self._signatures: dict[str, Tensor] = {}
        self._largest: Tensor | None = None  # norm so far
        self.is_pending = False
        self.tell: Callable[[list[str]], object] = _refuse

    def expect_more(self) -> None:
        """To be called when parameters have come."""
        self.is_pending = self._mesh.axis("tensor").size > 1

    def wants(self, name: str) -> bool:
        """Whether a parameter has still to be compared."""
        if not self.is_pending:
            return False
        layout = self._layouts[name]
        return layout.family == "dense" and not layout.cuts and self._looks[name] < _PATIENCE

    def look(self, name: str, parameter: Parameter) -> None:
        """Note this rank's gradient, before it is summed over other ranks."""
        self._signatures[name] = _signature(parameter)

    @torch.no_grad()
    def compare(self, named_parameters: Mapping[str, Parameter]) -> None:
        """Compare what was noted in this pass; every rank calls it with the same parameters. Where they differ, it is told."""
        names = [name for name in named_parameters if self.wants(name)]
        if not names:
            self.is_pending = False
            return
        absent = torch.zeros(_CHUNKS + 1, dtype=torch.double, device=named_parameters[names[0]].device)
        signatures = torch.stack([self._signatures.get(name, absent) for name in names])
        self._signatures.clear()
        largest = signatures[:, -1].max().view(1)
        if self._largest is not None:
            largest = largest.maximum(self._largest)
        highest, lowest = all_extremes(torch.cat([signatures.flatten(), largest]), self._mesh.axis("tensor"))
        self._largest = largest = highest[-1:]
        spread = (highest - lowest)[:-1].view_as(signatures).amax(1)
        norm = highest[:-1].view_as(signatures)[:, -1]
        floor = _NOISE * largest
        # An overflow, which loss scaling looks after, says nothing.
        wrong = (spread > REPLICA_TOLERANCE * norm.maximum(floor)) & spread.isfinite()
        clear = (norm > 0) & (norm >= floor) & norm.isfinite()
        # One decision for the whole world, so that all ranks stop together.
        verdict = all_reduce_(torch.stack([wrong, clear]).int(), self._mesh.axis("world"), "max").tolist()
        for name, seen in zip(names, verdict[1], strict=True):
            self._looks[name] += _PATIENCE if seen else 1
        guilty = [name for name, bad in zip(names, verdict[0], strict=True) if bad]
        if guilty:
            self.tell(guilty)


def _refuse(guilty: list[str]) -> None:
    raise PlanError(
        f"Parameters that are replicated over the tensor ranks got different gradients on them: {', '.join(guilty)}. They "
        "see split features, so each rank holds only a part of their gradient. Add them to the plan: "
        f"`tensor_parallel_plan={{..., '{guilty[0]}': 'replicated_with_grad_allreduce'}}`. (If all of them are listed, the "
        "tensor ranks may be reading different batches.)"
    )


def _signature(parameter: Parameter) -> Tensor:
    """A few numbers by which a gradient is told from others: sums over chunks of it (or all of it), and its norm."""
    signature = torch.zeros(_CHUNKS + 1, dtype=torch.double, device=parameter.device)
    grad = parameter.grad
    if grad is None or grad.numel() == 0:
        return signature
    flat = grad.detach().reshape(-1)
    wide = torch.promote_types(flat.dtype, torch.float32)
    length = -(-flat.numel() // _CHUNKS)
    whole = flat.numel() // length
    signature[:whole] = flat[: whole * length].view(whole, length).sum(1, dtype=wide)
    if whole < _CHUNKS:
        signature[whole] = flat[whole * length :].sum(dtype=wide)
    signature[-1] = torch.linalg.vector_norm(flat, dtype=wide).double()
    return signature
