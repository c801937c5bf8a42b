"""What one step sends: where counting begins and ends, in the order in which Lightning calls a strategy.

Note [The borders of a step]
    What runs within the strategy's ``training_step``, ``backward`` and ``optimizer_step`` is counted, and nothing else: no
    evaluation, checkpoint, or hook at the beginning or end of a batch. They lie inside each other. In automatic optimization,
    a batch that only accumulates is ``training_step``, then ``backward``; the last of a step is ``optimizer_step``, with the
    other two in it. In manual optimization, a batch is ``training_step``, with all else in it. So a step ends at the end of the
    outermost call in which an optimizer has stepped. Several optimizers that step in one batch are one step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from lightning_ted.collectives.recorder import CommRecorder, Recorders
from lightning_ted.errors import UnsupportedError
from lightning_ted.mesh import Ledger


class StepTraffic:
    """The calls and bytes of the last step of a fit, and of the one that is running."""

    def __init__(self) -> None:
        self._last: CommRecorder | None = None
        # None where the step has not been counted from its beginning.
        self._running: CommRecorder | None = None
        self._largest_kept: Counter[tuple[str, str]] = Counter()
        self._has_begun = False
        self._is_inside = False
        self._has_stepped = False

    @contextmanager
    def counted(self, ledger: Ledger, record: bool) -> Iterator[None]:
        """A part of a step; see the note above.

        Args:
            ledger: Of the mesh that is sent on.
            record: Whether to count; looked at where the outermost part begins.

        """
        if self._is_inside:
            yield
            return
        if not record:
            self._last = self._running = None
        elif not self._has_begun:
            self._running = CommRecorder()
        self._has_begun = self._is_inside = True
        before = ledger.recorder
        if self._running is not None:
            ledger.recorder = self._running if before is None else Recorders(before, self._running)
        try:
            yield
        except BaseException:
            self._begin_anew()
            raise
        finally:
            ledger.recorder = before
            self._is_inside = False
        if self._has_stepped:
            self._complete()

    def end_pass(self) -> None:
        """To be called after a backward pass, when what regions have kept for it is free again."""
        if self._running is None:
            return
        self._largest_kept = max(self._largest_kept, self._running.kept, key=Counter.total)
        self._running.kept = Counter()

    def end_step(self) -> None:
        """To be called when an optimizer has stepped, within what is counted."""
        self._has_stepped = True

    def _complete(self) -> None:
        self.end_pass()
        if self._running is not None:
            self._running.kept = self._largest_kept
            self._last = self._running
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._running, self._largest_kept = None, Counter()
        self._has_begun = self._has_stepped = False

    def read(self, record: bool) -> CommRecorder:
        """The counts of the last step; ``record``: whether any are wanted.

        Raises:
            UnsupportedError: If there are none.

        """
        if not record:
            raise UnsupportedError(
                "`TEDStrategy.communication` is not counted with `record_communication=False`. Set "
                "`TEDStrategy(record_communication=True)`, or `trainer.strategy.record_communication = True` at any time."
            )
        if self._last is None:
            raise UnsupportedError(
                "`TEDStrategy.communication` is there once a step has been counted from its first batch to its last one. Read it "
                "in `on_train_batch_end` of a batch in which an optimizer has stepped, or later."
            )
        return self._last
