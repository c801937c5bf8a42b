"""What is added to the message of an exception that ends a run."""

from __future__ import annotations

import re

_HINTS = {
    r"(?i)closed by peer|reset by peer|remote worker": (
        "Another rank has left: this rank waited for it in a collective. The first traceback of the other ranks, not this "
        "one, tells why."
    ),
    r"(?i)out of memory|can't allocate memory|not enough memory": (
        "A smaller batch with `Trainer(accumulate_grad_batches=...)`, activation checkpointing, a larger "
        "`tensor_parallel_size` or `sequence_parallel=True` each need less memory on this rank. The other ranks will say "
        "that it has left."
    ),
}


def add_hint(exception: BaseException) -> None:
    """Append the hint that fits the exception's message, if one does."""
    for pattern, hint in _HINTS.items():
        exception.args = tuple(
            f"{arg}\nHINT: {hint}" if isinstance(arg, str) and re.search(pattern, arg) else arg
            for arg in exception.args
        )
