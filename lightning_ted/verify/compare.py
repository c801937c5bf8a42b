"""Two measurements of a step beside each other, and what their difference is likely to come from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ted.errors import VerificationError
from lightning_ted.topology import Topology
from lightning_ted.verify.measure import Measured
from lightning_ted.verify.report import ParameterRow, VerificationReport

#: How far an update may be off, relative to it, where an element's gradient is larger than so little of their mean square root: of
#: some optimizers, the first step depends on its sign alone.
_UPDATE, _CLEAR = 1e-2, 1e-2
#: A gradient whose norm is smaller than this, relative to that of all together, is rounding noise.
_NOISE = 1e-6
#: How near a factor has to be to a degree of the layout to be explained by it.
_NEAR = 1e-2


@dataclass(frozen=True)
class Difference:
    """Of one gradient.

    Attributes:
        size: Relative to the wanted one.
        factor: By which the wanted one comes nearest.
        residual: What then remains, relative to the one that was found.

    """

    size: float
    factor: float
    residual: float


def difference(got: Tensor | None, want: Tensor | None, floor: float) -> Difference:
    """How two gradients differ; one that is missing is zero. ``floor``: the least norm to compare with."""
    if got is None and want is None:
        return Difference(0.0, 1.0, 0.0)
    have = torch.zeros_like(want) if got is None else got.double()  # type: ignore[arg-type]
    wanted = torch.zeros_like(have) if want is None else want.double()
    if have.shape != wanted.shape or not have.isfinite().all():
        return Difference(float("inf"), float("nan"), float("inf"))
    scale = max(float(wanted.norm()), floor)
    size = float((have - wanted).norm()) / scale if scale else float((have - wanted).norm())
    square = float(wanted.square().sum())
    factor = float((have * wanted).sum()) / square if square else float("inf") if have.any() else 1.0
    residual = float((have - factor * wanted).norm()) / max(float(have.norm()), floor, 1e-30) if square else 1.0
    return Difference(size, factor, residual)


def compare(
    got: Measured, want: Measured, again: Measured | None, topology: Topology, tolerance: float
) -> VerificationReport:
    """What the ranks have computed together, beside what one process has.

    Args:
        got: Of the ranks.
        want: Of one process.
        again: Of one process with other random numbers; None if that has not been tried.
        topology: Of the ranks.
        tolerance: Relative, of gradients, outputs and norms.

    """
    if not want.norms:
        raise VerificationError(
            "No optimizer stepped in the first batch, so there are no gradients to compare. In manual optimization, let "
            "`training_step` step in its first call."
        )
    total = sum(norm**2 for norm in want.norms) ** 0.5
    rows = []
    for name in want.gradients.keys() | got.gradients.keys():
        found = difference(got.gradients.get(name), want.gradients.get(name), _NOISE * total)
        update = _update(name, got, want)
        ok = found.size <= tolerance and (update is None or update <= _UPDATE)
        cause = "" if ok else _cause_of(name, found, update, got, topology, tolerance)
        rows.append(ParameterRow(name, found.size, update, found.factor, ok, cause))
    rows.sort(key=lambda row: (row.ok, -row.gradient, row.name))
    loss = None if got.loss is None or want.loss is None else _relative(got.loss, want.loss)
    rows += _untrained(got, want, tolerance)
    outputs = _largest(_distance(a, b) for a, b in zip(got.outputs, want.outputs, strict=False))
    norm = _largest(_relative(a, b) for a, b in zip(got.norms, want.norms, strict=False))
    same_kind = len(got.outputs) == len(want.outputs) and len(got.norms) == len(want.norms)
    near = (loss is None or loss <= tolerance) and outputs <= tolerance and norm <= tolerance
    ok = same_kind and near and all(row.ok for row in rows)
    module = "" if near else _first_module(got, want, tolerance)
    report = VerificationReport(
        ok, _described(topology), loss, outputs, module, norm, tuple(rows), tolerance, notes=tuple(_notes(got))
    )
    causes = () if ok else tuple(dict.fromkeys(_causes(report, got, want, again, topology)))
    return VerificationReport(**{**vars(report), "causes": causes})


def _untrained(got: Measured, want: Measured, tolerance: float) -> list[ParameterRow]:
    """Buffers and frozen parameters that the step has left different."""
    rows = []
    for name in want.after.keys() & got.after.keys() - want.gradients.keys() - got.gradients.keys():
        off = _distance(got.after[name], want.after[name])
        if not off <= tolerance:
            cause = "a statistic of one rank's samples, or of numbers that it draws"
            rows.append(ParameterRow(name, 0.0, off, 1.0, False, cause))
    return sorted(rows, key=lambda row: row.name)


def _largest(values: Iterable[float]) -> float:
    """The largest; what is no number is larger than all."""
    return max((float("inf") if value != value else value for value in values), default=0.0)


def _described(topology: Topology) -> str:
    top = topology
    return (
        f"{top.world_size} ranks = tensor {top.tensor} x data {top.data} = expert-tensor {top.expert_tensor} x expert {top.expert} "
        f"x expert-data {top.expert_data}"
    )


def _update(name: str, got: Measured, want: Measured) -> float | None:
    before, after, wanted = want.before.get(name), got.after.get(name), want.after.get(name)
    if before is None or after is None or wanted is None:
        return None
    gradient = want.gradients.get(name)
    if gradient is not None and gradient.shape == before.shape == after.shape:
        clear = gradient.abs() > _CLEAR * gradient.square().mean().sqrt()
        before, after, wanted = before[clear], after[clear], wanted[clear]
    step = float((wanted.double() - before.double()).norm())
    off = float((after.double() - wanted.double()).norm())
    # Weights are rounded to their own size, of which a small step is little.
    rounding = torch.finfo(before.dtype).eps * float(wanted.double().norm()) if before.is_floating_point() else 0.0
    return max(off - rounding, 0.0) / max(step, rounding, 1e-30) if off else 0.0


def _relative(got: float, want: float) -> float:
    return abs(got - want) / max(abs(want), 1e-30) if got != want else 0.0


def _distance(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        return float("inf")
    off = float((got.double() - want.double()).norm())
    return off / max(float(want.double().norm()), 1e-30) if off else 0.0


def _first_module(got: Measured, want: Measured, tolerance: float) -> str:
    """The first one, in the order of one process, whose output is whole on the ranks and another. Inner ones end first."""
    for name, (elements, squares) in want.modules.items():
        found = got.modules.get(name)
        if found is not None and found[0] == elements and _relative(found[1], squares) > 10 * tolerance:
            return name
    return ""


def _notes(got: Measured) -> list[str]:
    notes = list(got.told)
    if got.random:
        shown = ", ".join(got.random[:3]) + (", ..." if len(got.random) > 3 else "")
        notes.append(f"Dropout was switched off, since ranks and one process draw other numbers: {shown}.")
    return notes


# -- causes ----------------------------------------------------------------------------------------------------------------


def _cause_of(
    name: str, found: Difference, update: float | None, got: Measured, topology: Topology, tolerance: float
) -> str:
    if name in got.partial:
        return "differs between tensor ranks, each of which has a part of it: give it the style 'replicated_with_grad_allreduce'"
    if found.size <= tolerance:
        return "the gradient is right and the step is not: the optimizer"
    if got.gradients.get(name) is None:
        return "has no gradient on the ranks"
    if found.residual < _NEAR and abs(found.factor - 1) > _NEAR:
        return _cause_of_factor(found.factor, topology)
    return ""


def _cause_of_factor(factor: float, topology: Topology) -> str:
    degrees = {"data": topology.data, "tensor": topology.tensor, "expert": topology.expert}
    for axis, degree in degrees.items():
        for number, how in ((float(degree), "too large"), (1 / degree, "too small")):
            if degree > 1 and abs(factor / number - 1) < _NEAR:
                return f"{how} by the {axis} degree {degree}"
    return "is scaled"


def _causes(
    report: VerificationReport, got: Measured, want: Measured, again: Measured | None, topology: Topology
) -> list[str]:
    wrong = [row for row in report.rows if not row.ok]
    gradients = [row for row in wrong if row.gradient > report.tolerance]
    causes = []
    if again is not None and again.loss != want.loss:
        causes.append(
            "The module draws random numbers (router noise, sampling, functional dropout): with another seed, one process does not "
            "equal itself either. Switch them off to compare."
        )
    if got.partial:
        causes.append(
            f"The plan forgets replicated parameters that see split features: {', '.join(got.partial[:4])}. Name them in "
            "`tensor_parallel_plan` with the style 'replicated_with_grad_allreduce'."
        )
    if got.local and topology.data > 1:
        causes.append(
            f"Statistics are of this rank's samples: {got.local[0]} normalises over the batch. Use `Trainer(sync_batchnorm=True)`, "
            "whose layers run on GPUs only, or another norm."
        )
    elif report.module:
        causes.append(
            f"The plan cuts what it should not, or in the wrong style, in or before '{report.module}': its output is another."
        )
    elif gradients and (report.loss or 0) > report.tolerance:
        causes.append(_cause_of_loss(got, want, topology))
    elif gradients and all(_is_of_router(row.name) for row in gradients):
        causes.append(
            "Only routers' gradients differ: an auxiliary loss of this rank's tokens, not of all. The layers of this package "
            "compute theirs of all; of others, it is what data parallelism makes of it."
        )
    elif gradients and not got.partial:
        causes.append(
            "All outputs are right, and gradients are not: something that is not a layer of the plan sees split features, or one "
            "outside of it is used by some ranks alone."
        )
    if any(row.name in want.gradients for row in wrong) and not gradients:
        causes.append(
            "All gradients are right, and the weights after the step are not: the optimizer, or clipping that the module does."
        )
    return causes


def _cause_of_loss(got: Measured, want: Measured, topology: Topology) -> str:
    assert got.loss is not None and want.loss is not None
    if want.loss and abs(got.loss / want.loss * topology.data - 1) < _NEAR and topology.data > 1:
        return "The loss is a sum over this rank's samples, and ranks are averaged: too small by the data degree. Make it a mean."
    return (
        "All outputs are right and the loss is not: it is no mean over samples that each count alike, but perhaps one over the "
        "tokens of this rank that are not padding. Divide by the number of all ranks."
    )


def _is_of_router(name: str) -> bool:
    return any(part in ("router", "gate") for part in name.split("."))
