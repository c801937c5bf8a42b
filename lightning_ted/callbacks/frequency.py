"""How often a callback looks."""

from __future__ import annotations

from lightning.pytorch import Trainer

from lightning_ted.errors import TEDError


def checked_frequency(every_n_steps: int | None) -> int | None:
    """``every_n_steps``, if it is a number of steps or None.

    Raises:
        TEDError: If it is not.

    """
    if every_n_steps is not None and every_n_steps < 1:
        raise TEDError(f"`every_n_steps={every_n_steps}` must be at least 1, or None.")
    return every_n_steps


def is_due(trainer: Trainer, every_n_steps: int | None) -> bool:
    """Whether the last optimizer step is one to look at; None stands for the Trainer's ``log_every_n_steps``."""
    return trainer.global_step % (every_n_steps or trainer.log_every_n_steps or 1) == 0  # type: ignore[attr-defined]
