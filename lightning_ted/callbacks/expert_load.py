"""How evenly the router spreads the tokens over the experts."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_ted.callbacks.frequency import checked_frequency, is_due
from lightning_ted.moe import drop_rate, expert_counts
from lightning_ted.moe.layer import moe_layers


def imbalance(counts_E: Tensor) -> float:
    """Load of the busiest expert in multiples of the mean load: 1 is perfect, the number of experts is the worst."""
    total = float(counts_E.sum())
    return float(counts_E.max()) * counts_E.numel() / total if total else 1.0


class ExpertLoadMonitor(Callback):
    """Show the load of the busiest expert, in multiples of the mean load.

    Logs ``expert_load/<name of the layer>`` for every MoE layer, and the largest of them as ``expert_load`` in the
    progress bar; ``drop_rate/<name of the layer>`` where a capacity is set. Counts are those of the last forward of the
    step, summed over all ranks.

    Args:
        every_n_steps: How often to look, in optimizer steps; None for the Trainer's ``log_every_n_steps``. A look
            communicates a few numbers per layer.

    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        self.every_n_steps = checked_frequency(every_n_steps)
        self._last_step = 0

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # With gradient accumulation several batches end at the same step; the last step is kept so as to look once.
        step = trainer.global_step
        if step == self._last_step or not is_due(trainer, self.every_n_steps):
            return
        self._last_step = step
        loads = {name: imbalance(counts_E) for name, counts_E in expert_counts(pl_module).items()}
        if loads:
            pl_module.log_dict({f"expert_load/{name}": load for name, load in loads.items()})
            pl_module.log("expert_load", max(loads.values()), prog_bar=True)
        capped = {name for name, layer in moe_layers(pl_module).items() if layer.capacity_factor is not None}
        if capped:
            rates = {f"drop_rate/{name}": rate for name, rate in drop_rate(pl_module).items() if name in capped}
            pl_module.log_dict(rates)
