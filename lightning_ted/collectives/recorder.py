"""Counting calls and bytes of the collectives, by kind, axis and phase."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from lightning_ted.collectives.phase import Phase, current_phase


class TrafficKey(NamedTuple):
    """What collectives are counted by."""

    kind: str
    axis: str
    phase: Phase


class CommRecorder:
    """Counts what this rank sends, in a context of :meth:`lightning_ted.mesh.TEDMesh.recording` or in a step of training.

    Bytes are those that this rank sends, by the ring algorithms' counts: an all-reduce of ``n`` bytes over ``g`` ranks sends
    ``2 n (g - 1) / g``, a reduce-scatter ``n (g - 1) / g``, an all-gather of ``n`` local bytes ``n (g - 1)``, an all-to-all
    what it addresses to others.

    Attributes:
        calls_by: Number of collectives by :class:`TrafficKey`.
        bytes_by: Bytes by the same.
        kept: Bytes that regions of communication-aware checkpointing have kept for their recomputation, by ``(kind, axis)``;
            those of several forwards are added, but in ``TEDStrategy.communication``, which tells what was kept at once.

    """

    def __init__(self) -> None:
        self.calls_by: Counter[TrafficKey] = Counter()
        self.bytes_by: Counter[TrafficKey] = Counter()
        self.kept: Counter[tuple[str, str]] = Counter()

    @property
    def calls(self) -> Counter[tuple[str, str]]:
        """Number of collectives by ``(kind, axis)``, all phases together."""
        return _over_phases(self.calls_by)

    @property
    def bytes(self) -> Counter[tuple[str, str]]:
        """Bytes by ``(kind, axis)``, all phases together."""
        return _over_phases(self.bytes_by)

    def note(self, kind: str, axis: str, sent: int) -> None:
        """Add one collective that sent ``sent`` bytes."""
        key = TrafficKey(kind, axis, current_phase())
        self.calls_by[key] += 1
        self.bytes_by[key] += sent

    def note_kept(self, kind: str, axis: str, size: int) -> None:
        """Add one outcome of ``size`` bytes that is kept for a recomputation."""
        self.kept[kind, axis] += size

    def clear(self) -> None:
        """Begin anew."""
        self.calls_by.clear()
        self.bytes_by.clear()
        self.kept.clear()


class Recorders:
    """Several recorders that count the same.

    Args:
        recorders: The recorders.

    """

    def __init__(self, *recorders: Any) -> None:
        self._recorders = recorders

    def note(self, kind: str, axis: str, sent: int) -> None:
        """As :meth:`CommRecorder.note`."""
        for recorder in self._recorders:
            recorder.note(kind, axis, sent)

    def note_kept(self, kind: str, axis: str, size: int) -> None:
        """As :meth:`CommRecorder.note_kept`."""
        for recorder in self._recorders:
            recorder.note_kept(kind, axis, size)


def _over_phases(counts: Counter[TrafficKey]) -> Counter[tuple[str, str]]:
    total: Counter[tuple[str, str]] = Counter()
    for key, count in counts.items():
        total[key.kind, key.axis] += count
    return total
