"""Running a function whose activations are made again in backward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lightning_ted.collectives.tape import KeepPolicy, Tape, keeps_operator

#: ``"full"`` recomputes everything; ``"comm_aware"`` everything but collectives and the products that only they read.
CheckpointMode = Literal["full", "comm_aware"]


@dataclass(frozen=True)
class RecomputeOptions:
    """What is recomputed.

    Attributes:
        mode: Whether the outcomes of collectives are kept.
        keep: Of which collectives, in mode ``"comm_aware"``.

    """

    mode: CheckpointMode = "comm_aware"
    keep: KeepPolicy = "all"

    def contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """A forward's context and that of its recomputation, on a tape of their own."""
        tape = Tape(self.keep if self.mode == "comm_aware" else "choices")
        return tape.recording(), tape.replaying()


def checkpointed(options: RecomputeOptions, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)``, of which only the arguments are kept for backward, which runs it again.

    Random numbers are the same again. Where no gradients are recorded, it is just called.

    Args:
        options: What need not be done again.
        function: What to run; it has to do the same in both runs.
        args: Its arguments.
        kwargs: Its keyword arguments.

    Raises:
        RecomputationError: In backward, if it does not.

    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    contexts: Callable[[], Any] = options.contexts
    if torch.compiler.is_compiling():
        # A compiler cannot trace a tape; it can leave operators out of what it recomputes.
        contexts = partial(create_selective_checkpoint_contexts, partial(_policy, options))
    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _policy(options: RecomputeOptions, context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if options.mode == "comm_aware" and keeps_operator(options.keep, operator):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
