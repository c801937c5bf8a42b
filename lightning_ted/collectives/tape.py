"""What a recomputation need not do again (communication-aware checkpointing, arXiv 2303.06318, section 5.2).

A region of activation checkpointing owns a tape. In the forward, the outcomes of collectives, of routing and of reading
sizes on the host go on it; in the recomputation they are taken from it in the same order. The tape belongs to one run of
the region and is kept alive by that run's graph alone: nothing of one forward can reach the recomputation of another,
and with the graph of a forward that never gets a backward, its tape is gone.

Regions may be nested. While the outer one is recomputed, the inner one runs its forward again, on a new tape, whose
entries come from the outer one's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from lightning_ted.collectives.phase import during
from lightning_ted.errors import TEDError
from lightning_ted.mesh import Axis

T = TypeVar("T")

#: What a region keeps of its collectives, beside routing and sizes: all of them; all but all-gathers, whose outcome is
#: larger than what was sent; or all-to-alls only, which cross nodes.
KeepPolicy = Literal["all", "default", "all_to_all"]
KEEP_POLICIES: tuple[KeepPolicy, ...] = get_args(KeepPolicy)

_ALWAYS = frozenset({"choice", "sizes"})
_KEPT: dict[str, frozenset[str]] = {
    "all": _ALWAYS | {"all_to_all", "all_reduce", "reduce_scatter", "all_gather"},
    "default": _ALWAYS | {"all_to_all", "all_reduce", "reduce_scatter"},
    "all_to_all": _ALWAYS | {"all_to_all"},
    "choices": frozenset({"choice"}),
}

#: The collectives' operators, by what they are kept as.
_OPERATORS = {
    "all_to_all_single": "all_to_all",
    "all_reduce": "all_reduce",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_gather_into_tensor": "all_gather",
}


def keeps_operator(policy: KeepPolicy, operator: Any) -> bool:
    """Whether a policy keeps the outcome of an operator of torch's; a reduce-scatter by all-to-all is taken for one."""
    name = getattr(operator, "__name__", "").partition(".")[0]
    if getattr(operator, "namespace", "") != "_c10d_functional":
        return False
    return name == "wait_tensor" or _OPERATORS.get(name) in _KEPT[policy]


class RecomputationError(TEDError):
    """A recomputation does not do what its forward did."""


class Tape:
    """The outcomes of one run of a region.

    Args:
        policy: Which collectives are kept; ``"choices"`` for none, but what has been chosen by them.

    """

    def __init__(self, policy: KeepPolicy | Literal["choices"]) -> None:
        self.kinds = _KEPT[policy]
        self.entries: list[tuple[Hashable, Any, int]] = []

    def recording(self) -> _Run:
        """A context: the forward of the region."""
        return _Run(self, replays=False)

    def replaying(self) -> _Run:
        """A context: its recomputation; may be entered again, for another backward over the same graph."""
        return _Run(self, replays=True)

    def add(self, key: Hashable, value: Any) -> None:
        """Keep an outcome."""
        if isinstance(value, Tensor):
            # Not the tensor itself, which is about to get the graph that keeps this tape alive.
            value = value.detach()
        self.entries.append((key, value, _version(value)))


def _version(value: Any) -> int:
    """How often a tensor has been changed in place."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


class _Run:
    """A forward or recomputation of a tape's region."""

    def __init__(self, tape: Tape, replays: bool) -> None:
        self.tape = tape
        self.replays = replays
        self.callbacks: list[Callable[[], None]] = []
        self._position = 0
        self._phase: AbstractContextManager[None] = nullcontext()

    def __enter__(self) -> None:
        self._position = 0
        if self.replays:
            # It begins wherever backward first wants a saved tensor: in the middle of a collective's dual, too.
            self._phase = during("recomputation")
            self._phase.__enter__()
        else:
            self.tape.entries.clear()
        _running.append(self)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        _running.remove(self)
        while self.callbacks:
            self.callbacks.pop()()
        self._phase.__exit__(kind, error, at)

    def next(self, key: Hashable) -> tuple[Any, bool]:
        """The next outcome, and whether it is still what it was."""
        entries = self.tape.entries
        if self._position == len(entries) or entries[self._position][0] != key:
            expected = entries[self._position][0] if self._position < len(entries) else "nothing more"
            raise RecomputationError(
                f"The recomputation of a checkpointed region asks for {key}, where its forward had {expected}. Both have to run "
                "the same layers in the same order on the same shapes; leave blocks whose forward depends on anything but their "
                "arguments and random numbers out of `activation_checkpointing_policy`."
            )
        _, value, version = entries[self._position]
        self._position += 1
        if not isinstance(value, Tensor):
            return value, True
        # Its own tensor again, for the graph that is being made.
        return value.detach(), _version(value) == version


#: The regions around the running code, the innermost last. One for all threads: autograd may recompute in another thread,
#: while the one that called it waits.
_running: list[_Run] = []


def kept(kind: str, axis: Axis | None, key: Hashable, make: Callable[[], T]) -> T:
    """``make()``, or what it returned in the forward that is being recomputed.

    Args:
        kind: A collective; ``"choice"`` for what must not be chosen anew, or ``"sizes"`` for what is read on the host.
        axis: Where the collective takes place; None for what is no collective.
        key: What forward and recomputation have to agree on: the same on both, or else an error.
        make: Is not called in a recomputation whose region has kept the kind.

    Raises:
        RecomputationError: If a recomputation asks for something else than its forward did.

    """
    return _kept(kind, axis, key, make) if _running else make()


def is_replayed(kind: str) -> bool:
    """Whether the next outcome of this kind comes from a tape, so that nobody will read what it is made of."""
    return _is_replayed(kind) if _running else False


def after_recomputation(callback: Callable[[], None]) -> None:
    """Call ``callback`` when the region that is being recomputed ends; never, where none is."""
    for run in reversed(_running):
        if run.replays:
            run.callbacks.append(callback)
            return


def unseen(make: Callable[[], T]) -> T:
    """``make()``, of whose parts nothing is kept, because they are of one piece with something that is."""
    return _unseen(make) if _running else make()


# What follows runs within regions only, and never compiled: a tape is no tensor.
_eager = torch.compiler.disable(
    reason="a region of `activation_checkpointing` puts the outcomes of collectives on a tape"
)


@_eager
def _is_replayed(kind: str) -> bool:
    return any(run.replays for run in _running if kind in run.tape.kinds)


@_eager
def _kept(kind: str, axis: Axis | None, key: Hashable, make: Callable[[], T]) -> T:
    key = kind, None if axis is None else axis.name, key
    takers: list[Tape] = []
    value: Any
    for run in reversed(_running):
        if kind not in run.tape.kinds:
            continue
        if run.replays:
            value, intact = run.next(key)
            if not intact:
                _warn_changed(kind)
                value = unseen(make)
            break
        takers.append(run.tape)
    else:
        value = unseen(make) if takers else make()
        if takers and axis is not None and axis.ledger.recorder is not None:
            axis.ledger.recorder.note_kept(kind, axis.name, value.numel() * value.element_size())
    for tape in takers:
        tape.add(key, value)
    return value


@_eager
def _unseen(make: Callable[[], T]) -> T:
    outer = _running[:]
    _running.clear()
    try:
        return make()
    finally:
        _running[:] = outer


def _warn_changed(kind: str) -> None:
    what = "a router's choice" if kind == "choice" else f"an {kind.replace('_', '-')}"
    again = "chooses" if kind == "choice" else "communicates"
    warnings.warn(
        f"The outcome of {what} was changed in place after it had been kept for the recomputation, which therefore {again} again. "
        "Write `x = x + y` for `x += y` where `x` comes out of a row-parallel or MoE layer.",
        stacklevel=4,
    )
