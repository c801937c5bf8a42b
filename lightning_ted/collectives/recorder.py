"""Counting calls and bytes of the collectives, by kind and axis."""

from __future__ import annotations

from collections import Counter


class CommRecorder:
    """Counts what this rank sends, in a context of :meth:`lightning_ted.mesh.TEDMesh.recording`.

    Attributes:
        calls: Number of collectives by ``(kind, axis)``.
        bytes: Bytes that this rank sends by ``(kind, axis)``, by the ring algorithms' counts: an all-reduce of ``n``
            bytes over ``g`` ranks sends ``2 n (g - 1) / g``, a reduce-scatter ``n (g - 1) / g``, an all-gather of ``n``
            local bytes ``n (g - 1)``, an all-to-all what it addresses to others.

    """

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()

    def note(self, kind: str, axis: str, sent: int) -> None:
        """Add one collective that sent ``sent`` bytes."""
        self.calls[kind, axis] += 1
        self.bytes[kind, axis] += sent
