"""What training sends, as numbers in the logs, a table and a chart."""

from __future__ import annotations

import csv
import os
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, get_args

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from lightning_ted.callbacks.frequency import checked_frequency, is_due
from lightning_ted.collectives.phase import Phase
from lightning_ted.collectives.recorder import CommRecorder, TrafficKey
from lightning_ted.errors import UnsupportedError

PHASES: tuple[Phase, ...] = get_args(Phase)
TABLE, CHART = "communication.csv", "communication.png"
_COLORS = {"forward": "#4c72b0", "recomputation": "#dd8452", "backward": "#55a868", "optimizer": "#8172b3"}


class Row(NamedTuple):
    """A row of the table; ``phase`` is ``"kept"`` for what regions keep for their recomputation, where nothing is called."""

    kind: str
    axis: str
    phase: str
    steps: int
    calls_per_step: float | None
    bytes_per_step: float


class CommunicationMonitor(Callback):
    """Show what training sends: in the logs while it runs, and as a table and a bar chart at its end.

    Switches on ``TEDStrategy.record_communication``. All numbers are those of rank 0, in bytes sent in one optimizer step
    with all of the batches that it accumulates; other ranks may send more or fewer, as tokens go where the router sends them.

    Logs ``sent_bytes``, ``sent_bytes/<phase>`` and ``sent_bytes/<kind>/<axis>``, such as ``sent_bytes/all_to_all/expert``; with
    communication-aware checkpointing also ``kept_bytes``, what its regions keep at once. At the end of the fit, prints a table
    of the means over all of its steps, and writes ``communication.csv`` and ``communication.png`` (bars by kind and axis,
    stacked by phase), over those of an earlier fit. A fit that ends by an exception writes neither.

    Args:
        dirpath: Where the files are written; None for the logger's directory, or the Trainer's ``default_root_dir``.
        every_n_steps: How often to log, in optimizer steps; None for the Trainer's ``log_every_n_steps``, at which loggers write
            what is newest. Every step counts in the table, logged or not.
        chart: Whether to draw the chart, which takes matplotlib.

    """

    def __init__(self, dirpath: str | Path | None = None, every_n_steps: int | None = None, chart: bool = True) -> None:
        if chart and find_spec("matplotlib") is None:
            raise ModuleNotFoundError(
                "`CommunicationMonitor(chart=True)` draws with matplotlib, which is not installed. Run "
                "`pip install lightning-ted[plots]`, or pass `chart=False`."
            )
        if dirpath is not None and not isinstance(dirpath, (str, Path)):
            raise UnsupportedError(f"`CommunicationMonitor(dirpath={dirpath!r})` must be a path or None.")
        if not isinstance(chart, bool):
            raise UnsupportedError(f"`CommunicationMonitor(chart={chart!r})` must be True or False.")
        self.dirpath = dirpath
        self._folder = ""
        self.every_n_steps = checked_frequency(every_n_steps)
        self.chart = chart
        self._forget()

    def _forget(self) -> None:
        self._last: CommRecorder | None = None
        self._steps = 0
        self._calls: Counter[TrafficKey] = Counter()
        self._bytes: Counter[TrafficKey] = Counter()
        self._kept: Counter[tuple[str, str]] = Counter()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        strategy: Any = trainer.strategy
        if not hasattr(strategy, "record_communication"):
            raise UnsupportedError(
                f"`CommunicationMonitor` shows what `TEDStrategy` counts, and `{type(strategy).__name__}` does not count. Use "
                "`Trainer(strategy=TEDStrategy(...))`, or leave the callback out."
            )
        strategy.record_communication = True
        self._forget()
        # The loggers' directory is broadcast, so all ranks ask for it.
        self._folder = str(self.dirpath or trainer.log_dir or trainer.default_root_dir)
        refusal = ""
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            try:
                get_filesystem(self._folder).makedirs(self._folder, exist_ok=True)
            except OSError as error:
                refusal = f"{type(error).__name__}: {error}"
        refusal = strategy.broadcast(refusal)
        if refusal:
            raise UnsupportedError(
                f"`CommunicationMonitor(dirpath={self.dirpath!r})` is to write its table to '{self._folder}', which cannot be "
                f"made ({refusal}). Give it a directory that can."
            )

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = self._new_step(trainer)
        if step is None:
            return
        self._steps += 1
        # Not as Counters are added, which would drop a kind of which nothing was sent.
        self._calls.update(step.calls_by)
        self._bytes.update(step.bytes_by)
        self._kept = max(self._kept, step.kept, key=Counter.total)
        if is_due(trainer, self.every_n_steps):
            pl_module.log_dict(self._metrics(step))

    def _new_step(self, trainer: Trainer) -> CommRecorder | None:
        """The counts of a step that has not been looked at; None while batches accumulate, or if counting is switched off."""
        strategy: Any = trainer.strategy
        try:
            found: CommRecorder = strategy.communication
        except UnsupportedError:
            return None
        if found is self._last:
            return None
        self._last = found
        return found

    def _metrics(self, step: CommRecorder) -> dict[str, float]:
        # One that has been seen is logged for ever, also in steps that have no such collective.
        sent = {f"{kind}/{axis}": step.bytes[kind, axis] for kind, axis, _ in sorted(self._bytes)}
        for phase in PHASES:
            sent[phase] = sum(size for key, size in step.bytes_by.items() if key.phase == phase)
        metrics = {f"sent_bytes/{name}": float(size) for name, size in sent.items()}
        metrics["sent_bytes"] = float(step.bytes_by.total())
        if self._kept:
            metrics["kept_bytes"] = float(step.kept.total())
        return metrics

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or self._steps == 0:
            return
        rows = self.rows()
        Console().print(table(rows))
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        try:
            self._write(rows)
        except OSError as error:
            # The table has been printed, and the other ranks go on.
            rank_zero_warn(f"`CommunicationMonitor` cannot write to '{self._folder}': {type(error).__name__}: {error}")

    def _write(self, rows: list[Row]) -> None:
        files = get_filesystem(self._folder)
        with files.open(os.path.join(self._folder, TABLE), "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([Row._fields, *rows])
        if self.chart:
            with files.open(os.path.join(self._folder, CHART), "wb") as file:
                draw(rows, file)

    def rows(self) -> list[Row]:
        """What the table shows: means over the steps of the fit so far; of what is kept, the largest of them."""
        steps = self._steps
        order = sorted(self._bytes, key=lambda key: (key.kind, key.axis, PHASES.index(key.phase)))
        sent = [Row(*key, steps, self._calls[key] / steps, self._bytes[key] / steps) for key in order]
        return sent + [Row(*key, "kept", steps, None, size) for key, size in sorted(self._kept.items())]


def table(rows: list[Row]) -> Table:
    """The rows for a console."""
    shown = Table(
        title="Sent in one step by rank 0", caption=f"means of {rows[0].steps} steps" if rows else "nothing is sent"
    )
    for name in ("kind", "axis", "phase"):
        shown.add_column(name)
    for name in ("calls", "bytes"):
        shown.add_column(name, justify="right")
    for row in rows:
        calls = "" if row.calls_per_step is None else f"{row.calls_per_step:,.2f}".removesuffix(".00")
        shown.add_row(row.kind, row.axis, row.phase, calls, f"{row.bytes_per_step:,.0f}")
    total = sum(row.bytes_per_step for row in rows if row.phase != "kept")
    shown.add_section()
    shown.add_row("all", "", "", "", f"{total:,.0f}")
    return shown


def draw(rows: list[Row], file: Any) -> None:
    """Write a PNG of the rows: a bar for each kind and axis, stacked by phase."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    bars = list(dict.fromkeys((row.kind, row.axis) for row in rows if row.phase != "kept"))
    size = {(row.kind, row.axis, row.phase): row.bytes_per_step for row in rows}
    # No pyplot: it would keep the figure, and look for a screen.
    figure = Figure(figsize=(8, 1.8 + 0.4 * len(bars)), dpi=150, layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(bars)
    for phase in PHASES:
        widths = [size.get((*bar, phase), 0.0) for bar in bars]
        axes.barh(range(len(bars)), widths, left=left, color=_COLORS[phase], label=phase)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(bars)), [f"{kind.replace('_', '-')}, {axis}" for kind, axis in bars])
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    axes.set_xlabel("sent in one step by rank 0")
    figure.legend(loc="outside lower center", ncols=len(PHASES), frameon=False)
    figure.savefig(file, format="png")
