"""In which part of a training step a collective is: for counting, never for deciding.

=================  =================================================================================================
phase              what communicates
=================  =================================================================================================
``forward``        layers, and whatever comes before or after a step
``recomputation``  layers again, for a region of activation checkpointing, within backward
``backward``       the duals of the layers' collectives, and the reduction of gradients
``optimizer``      the norm of the gradients, and the gathering of updated weights
=================  =================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

Phase = Literal["forward", "recomputation", "backward", "optimizer"]

#: What surrounds the running code, the innermost last. One for all threads: autograd may run backward in another thread,
#: while the one that called it waits.
_declared: list[Phase] = []


@contextmanager
def during(phase: Phase) -> Iterator[None]:
    """Declare the phase of what runs within the context, or of a function that is decorated by it."""
    _declared.append(phase)
    try:
        yield
    finally:
        _declared.pop()


def current_phase() -> Phase:
    """The phase of the running code: what was declared; else forward, or recomputation within a backward pass."""
    if _declared:
        return _declared[-1]
    return "recomputation" if in_backward() else "forward"


def in_backward() -> bool:
    """Whether autograd runs a backward pass at the moment; a layer that runs then is being recomputed."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def dual(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Mark the backward of a collective: it can be differentiated no further, and what it sends counts as backward."""

    @wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        if torch.compiler.is_compiling():
            return backward(ctx, *grads)
        with during("backward"):
            return backward(ctx, *grads)

    return once_differentiable(run)
