"""Running a module both ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist

from lightning_ted.errors import LayoutError, VerificationError
from lightning_ted.strategy._compat import is_overridden
from lightning_ted.strategy.ted import TEDStrategy
from lightning_ted.topology import Topology
from lightning_ted.verify.compare import compare
from lightning_ted.verify.measure import Measured, measure_alone, measure_together
from lightning_ted.verify.processes import run_together
from lightning_ted.verify.report import VerificationReport

#: More processes than this are not started without being asked for.
_MOST = 16


def verify(
    module: pl.LightningModule,
    batch: Any,
    make: Callable[[], TEDStrategy],
    processes: int | None = None,
    tolerance: float = 1e-5,
    seed: int = 0,
    timeout: float = 600.0,
    trainer_options: Mapping[str, Any] | None = None,
) -> VerificationReport:
    """Train one step of a module under a layout and in one process, on the CPU, and compare them.

    Weights get noise first, the same both ways, since constants hide errors; dropout is switched off. All of it happens in other
    processes: the module is not changed.

    Args:
        module: In float32; small enough for so many copies of it on this machine.
        batch: As ``training_step`` gets it, of all data ranks together: its tensors are split along their first dimension.
        make: Makes the strategy.
        processes: How many; None for as few as the degrees need, with two data ranks where that can be.
        tolerance: Relative, of gradients, outputs, loss and norms.
        seed: Of the noise.
        timeout: Seconds that a run may take.
        trainer_options: Of the Trainer, such as ``gradient_clip_val``.

    Returns:
        What was found.

    Raises:
        LayoutError, PlanError: If the degrees fit neither the processes nor the module.
        VerificationError: If the module cannot be run so.

    """
    if dist.is_initialized():
        raise VerificationError(
            "`verify` starts processes of its own; call it before a Trainer has run, or in a script alone."
        )
    if not isinstance(module, pl.LightningModule):
        raise VerificationError(f"`module={type(module).__name__}(...)` must be a LightningModule.")
    for name, value in (("tolerance", tolerance), ("timeout", timeout)):
        if not value > 0:
            raise VerificationError(f"`{name}={value!r}` must be positive.")
    options = dict(trainer_options or {})
    topology = find_topology(module, make, processes, timeout)
    world = topology.world_size
    measured = run_together(world, measure_together, (module, batch, make, options, seed), timeout)
    got = next(found for found in measured if found is not None)
    want = _alone(module, batch, options, seed, got, timeout)
    report = compare(got, want, None, topology, tolerance)
    if report.ok:
        return report
    again = _alone(module, batch, options, seed + 1, got, timeout)
    return compare(got, want, again, topology, tolerance)


def _alone(
    module: pl.LightningModule, batch: Any, options: Mapping[str, Any], seed: int, got: Measured, timeout: float
) -> Measured:
    (found,) = run_together(1, measure_alone, (module, batch, options, seed, got.before), timeout)
    return found


def find_topology(
    module: pl.LightningModule, make: Callable[[], TEDStrategy], processes: int | None, timeout: float
) -> Topology:
    """How so many processes are arranged; or the fewest that fit, with two data ranks if any do.

    Raises:
        LayoutError, PlanError: If none do.

    """
    # In another process, like all that changes the module: its layers are made there, and foreign ones adopted.
    (topology,) = run_together(1, _find, (module, make, processes), timeout)
    return topology


def _find(module: pl.LightningModule, make: Callable[[], TEDStrategy], processes: int | None) -> Topology:
    if is_overridden("configure_model", module):
        module.configure_model()
    strategy = make()
    if processes is not None:
        return strategy.resolve(module, processes, processes)
    failure: LayoutError | None = None
    fits: Topology | None = None
    for world in range(2, _MOST + 1):
        try:
            found = strategy.resolve(module, world, world)
        except LayoutError as error:
            # Rather what the module says of degrees than what a number of processes does.
            if failure is None or "world size" not in str(error):
                failure = error
            continue
        if found.data > 1:
            return found
        fits = fits or found
    if fits is None:
        assert failure is not None
        raise failure
    return fits
