"""Running a function whose activations are made again in backward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode
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


def checkpointed(options: RecomputeOptions, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
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
    call = function
    if isinstance(function, partial):  # as Hugging Face's layers hand over keyword arguments
        call, args, kwargs = function.func, (*function.args, *args), {**function.keywords, **kwargs}
    names, count = tuple(kwargs), len(args)

    def run(*values: Any) -> Any:
        return call(*values[:count], **dict(zip(names, values[count:], strict=True)))

    # Keyword arguments go by position, because those are seen to be the same in the recomputation, changed in place by nobody.
    return checkpoint(run, *args, *kwargs.values(), use_reentrant=False, context_fn=partial(_contexts, options))


def _contexts(options: RecomputeOptions) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """A forward's context and that of its recomputation."""
    if get_proxy_mode() is not None:
        # A compiler makes one graph of both. It cannot trace a tape; it can leave operators out of what it recomputes.
        return create_selective_checkpoint_contexts(partial(_policy, options))
    tape = Tape(options.keep if options.mode == "comm_aware" else "choices")
    return tape.recording(), tape.replaying()


def _policy(options: RecomputeOptions, context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if options.mode == "comm_aware" and keeps_operator(options.keep, operator):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
