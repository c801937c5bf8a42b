"""Averaging gradients over the ranks, by family and bucket.

The gradient of a parameter is summed over the ranks that saw different tokens for the same element, and divided by the
data-parallel degree, expert or not: an expert receives rows from many ranks, but each of their losses is a mean over
one data rank's batch (DeepSpeed-MoE, arXiv 2201.05596: "reduced over expert-data, divided by data").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_ted.collectives.primitives import all_extremes, all_reduce_, start_all_reduce_, wait
from lightning_ted.errors import PlanError
from lightning_ted.layout import Family, ParamLayout
from lightning_ted.mesh import TEDMesh
from lightning_ted.topology import AxisName

#: Over which axis a family's gradients are summed.
FAMILY_AXES: dict[Family, AxisName] = {"dense": "data", "partial": "world", "expert": "expert_data"}
#: Elements of one bucket.
BUCKET_SIZE = 2**23
#: Difference of a replicated parameter's gradients on tensor ranks, relative to their norm, above which its plan is wrong.
REPLICA_TOLERANCE = 1e-3
#: A gradient whose norm is smaller than this, relative to the largest, may be rounding noise: too small to tell.
_NOISE = 1e-2
#: Sums over consecutive elements by which gradients are compared.
_CHUNKS = 64
#: After so many reductions without a gradient to tell by, a parameter is not looked at any more.
_PATIENCE = 16

NamedParameters = Sequence[tuple[str, Parameter]]


@dataclass
class _Bucket:
    """Gradients of one family, dtype and device, flat, with one flag for each parameter behind them.

    Attributes:
        parameters: The parameters.
        flat: Their gradients, then the flags.
        present: Which of them have a gradient on this rank.

    """

    parameters: list[Parameter]
    flat: Tensor
    present: list[bool]

    @classmethod
    def fill(cls, parameters: list[Parameter]) -> _Bucket:
        """Take over the parameters' gradients; they have none until :meth:`hand_out`."""
        total = sum(parameter.numel() for parameter in parameters)
        flat = parameters[0].new_empty(total + len(parameters))
        flat[total:] = 1
        bucket = cls(parameters, flat, [parameter.grad is not None for parameter in parameters])
        pairs: list[tuple[Tensor, Tensor]] = []
        for index, (view, parameter) in enumerate(zip(bucket._views(), parameters, strict=True)):
            if parameter.grad is None:
                view.zero_()
                flat[total + index] = 0
            else:
                pairs.append((view, parameter.grad))
                # Freed once it is copied, before the next bucket is filled.
                parameter.grad = None
        if pairs:
            torch._foreach_copy_([view for view, _ in pairs], [grad for _, grad in pairs])
        return bucket

    def hand_out(self, divisor: int) -> None:
        """Make the reduced gradients the parameters' gradients, without a copy."""
        total = sum(parameter.numel() for parameter in self.parameters)
        self.flat[:total].div_(divisor)
        flags: list[float] | None = None
        for index, (view, parameter) in enumerate(zip(self._views(), self.parameters, strict=True)):
            if not self.present[index]:
                # Read on the host only where this rank has no gradient: another rank may have one.
                flags = self.flat[total:].tolist() if flags is None else flags
                if flags[index] == 0:
                    continue
            parameter.grad = view

    def _views(self) -> list[Tensor]:
        pieces = self.flat.split([p.numel() for p in self.parameters] + [len(self.parameters)])
        return [piece.view_as(p) for piece, p in zip(pieces, self.parameters, strict=False)]


class GradientReducer:
    """Averages gradients over the mesh.

    Args:
        mesh: The mesh.
        layouts: Qualified parameter name to layout.
        expert_duplicates: How many times every token reaches its expert: more than once where tensor ranks dispatch the
            same tokens to an expert that is not cut over them.

    """

    def __init__(self, mesh: TEDMesh, layouts: Mapping[str, ParamLayout], expert_duplicates: int = 1) -> None:
        self._mesh = mesh
        self._layouts = layouts
        self._expert_duplicates = expert_duplicates
        self._audits: Counter[str] = Counter()

    @torch.no_grad()
    def reduce(self, named_parameters: NamedParameters) -> None:
        """Average the gradients of all trainable parameters, in place; every rank calls it with the same names.

        A parameter without a gradient on this rank takes part with zeros, and gets one if another rank has one.

        Raises:
            PlanError: On the first step that gives a parameter a gradient, if it is replicated over the tensor ranks and
                they disagree.

        """
        named = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
        families: dict[Family, list[Parameter]] = {"dense": [], "partial": [], "expert": []}
        for name, parameter in named:
            families[self._layouts[name].family].append(parameter)
        started: list[tuple[_Bucket, int, Tensor]] = []
        for family, parameters in families.items():
            axis, divisor = self._mesh.axis(FAMILY_AXES[family]), self._divisor(family)
            if axis.size == 1:
                grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
                if divisor > 1 and grads:
                    torch._foreach_div_(grads, divisor)
                continue
            for group in _buckets(parameters):
                bucket = _Bucket.fill(group)
                started.append((bucket, divisor, start_all_reduce_(bucket.flat, axis)))
        for bucket, divisor, pending in started:
            wait(pending)
            bucket.hand_out(divisor)
        self._audit(named)

    def _divisor(self, family: Family) -> int:
        data = self._mesh.topology.data
        return data * self._expert_duplicates if family == "expert" else data

    def _audit(self, named: NamedParameters) -> None:
        """Compare the gradients of replicated parameters over the tensor ranks, until each has had one to compare.

        The first gradient may be zero everywhere (behind a projection that is initialised with zeros), so a parameter is
        looked at again until its gradient stands out of the noise, but not for ever, as the verdict is read on the host.
        """
        tensor = self._mesh.axis("tensor")
        if tensor.size == 1:
            return
        replicated = [(name, p) for name, p in named if self._is_replica(self._layouts[name])]
        pending = [(name, p) for name, p in replicated if self._audits[name] < _PATIENCE]
        if not pending:
            return
        signatures = torch.stack([_signature(parameter) for _, parameter in pending])
        settled = [_norm(parameter) for name, parameter in replicated if self._audits[name] >= _PATIENCE]
        largest = torch.stack([*signatures[:, -1], *settled]).max().view(1)
        highest, lowest = all_extremes(torch.cat([signatures.flatten(), largest]), tensor)
        largest = highest[-1]
        spread = (highest - lowest)[:-1].view_as(signatures).amax(1)
        norm = highest[:-1].view_as(signatures)[:, -1]
        wrong = spread > REPLICA_TOLERANCE * norm.clamp_min(_NOISE * largest)
        clear = (norm > 0) & (norm >= _NOISE * largest)
        # One decision for the whole world, so that all ranks stop together.
        verdict = all_reduce_(torch.stack([wrong, clear]).int(), self._mesh.axis("world"), "max").tolist()
        for (name, _), seen in zip(pending, verdict[1], strict=True):
            self._audits[name] += _PATIENCE if seen else 1
        names = [name for (name, _), bad in zip(pending, verdict[0], strict=True) if bad]
        if names:
            raise PlanError(
                f"Parameters that are replicated over the tensor ranks got different gradients on them: {', '.join(names)}. They "
                "see split features, so each rank holds only a part of their gradient. Add them to the plan: "
                f"`tensor_parallel_plan={{..., '{names[0]}': 'replicated_with_grad_allreduce'}}`. (If all of them are listed, the "
                "tensor ranks may be reading different batches.)"
            )

    @staticmethod
    def _is_replica(layout: ParamLayout) -> bool:
        return layout.family == "dense" and not layout.cuts


def _signature(parameter: Parameter) -> Tensor:
    """A few numbers by which a gradient is told from others: sums over chunks of it (or all of it), and its norm."""
    signature = torch.zeros(_CHUNKS + 1, dtype=torch.double, device=parameter.device)
    grad = parameter.grad
    if grad is None or grad.numel() == 0:
        return signature
    flat = grad.reshape(-1)
    wide = torch.promote_types(flat.dtype, torch.float32)
    length = -(-flat.numel() // _CHUNKS)
    whole = flat.numel() // length
    signature[:whole] = flat[: whole * length].view(whole, length).sum(1, dtype=wide)
    if whole < _CHUNKS:
        signature[whole] = flat[whole * length :].sum(dtype=wide)
    signature[-1] = _norm(parameter)
    return signature


def _norm(parameter: Parameter) -> Tensor:
    if parameter.grad is None:
        return torch.zeros((), dtype=torch.double, device=parameter.device)
    wide = torch.promote_types(parameter.grad.dtype, torch.float32)
    return torch.linalg.vector_norm(parameter.grad, dtype=wide).double()


def _buckets(parameters: list[Parameter]) -> Iterator[list[Parameter]]:
    """Parameters of one dtype and device, in buckets of about BUCKET_SIZE elements."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Parameter]] = {}
    for parameter in parameters:
        kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for members in kinds.values():
        bucket: list[Parameter] = []
        filled = 0
        for parameter in members:
            bucket.append(parameter)
            filled += parameter.numel()
            if filled >= BUCKET_SIZE:
                yield bucket
                bucket, filled = [], 0
        if bucket:
            yield bucket
