"""The spike of an optimizer step that casts all gradients of a rank to fp32, for growing expert counts on a fixed world.

TED (arXiv 2303.06318, section 4): with experts in every second layer a model of ``E`` experts has ``(E + 2) / 3`` times
the parameters of its base, each of ``G`` ranks steps one part in ``G`` of them, and needs 4 bytes for each at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_ted.optim.placement import place_in_order

EXPERTS = (4, 8, 16, 32, 64, 128)
WORLD = 32
TILE = 2**18


@dataclass(frozen=True)
class Base:
    """The matrices of a transformer whose every second layer becomes a mixture of experts.

    Attributes:
        layers: Number of layers; even.
        width: Of the residual stream; a quarter of the feed-forward layers'.

    """

    layers: int = 4
    width: int = 512

    @property
    def num_params(self) -> int:
        """Of the base model: ``NP_base``, of which the experts' layers are a third."""
        return self.layers * 12 * self.width**2

    def predicted_spike(self, experts: int, world: int) -> float:
        """Bytes, without tiles."""
        return 4 * (experts + 2) / 3 * self.num_params / world

    def rank_sizes(self, experts: int, world: int) -> list[int]:
        """Sizes of what the first rank owns of each parameter, as this package's own placement shares them out.

        No tensor parallelism; each expert on one rank while there are ranks enough, else equally many on each.
        """
        square, half = self.width**2, self.layers // 2
        dense = [3 * square, square] * self.layers + [4 * square, 4 * square] * half
        ranks = min(experts, world)
        local = [experts // ranks * 4 * square] * self.layers
        families = (dense, world), (local, world // ranks)
        return [stop - start for sizes, owners in families for _, start, stop in place_in_order(sizes, owners).owned(0)]


def lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The table as text."""
    keys = ("slice", "predicted_bytes", "untiled_bytes", "tile_bytes", "tiled_bytes")
    yield f"{'E':>4} {'slice (M)':>11} {'predicted MB':>13} {'untiled MB':>11} {'one tile MB':>12} {'tiled MB':>9}"
    for row in rows:
        columns = zip((11, 13, 11, 12, 9), keys, strict=True)
        yield f"{row['experts']:4d} " + " ".join(f"{row[key] / 1e6:{width}.2f}" for width, key in columns)


def draw(rows: Sequence[Mapping[str, Any]], base: Base, world: int, path: Path) -> None:
    """The table as a picture.

    Raises:
        ImportError: Without matplotlib.

    """
    from matplotlib.figure import Figure  # no window, no global state

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    experts = [row["experts"] for row in rows]

    def series(key: str) -> list[float]:
        return [row[key] / 1e6 for row in rows]

    axes.plot(experts, series("predicted_bytes"), "--", color="C3", label="predicted: 4 (E + 2) / 3 · base / G")
    axes.plot(experts, series("untiled_bytes"), "o", color="C3", label="measured, untiled")
    axes.plot(experts, series("tile_bytes"), "--", color="C0", label="predicted: one tile")
    axes.plot(experts, series("tiled_bytes"), "o", color="C0", label="measured, tiled")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(experts, [str(count) for count in experts])
    axes.set_xlabel("experts (E)")
    axes.set_ylabel("memory that a step takes (MB)")
    title = f"One rank of G = {world}, base of {base.num_params / 1e6:.1f} M parameters, AdamW, 16-bit gradients"
    axes.set_title(title, fontsize="medium")
    axes.legend()
    figure.savefig(path, dpi=120)
