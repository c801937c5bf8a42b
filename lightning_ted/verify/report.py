"""What a comparison of a layout with one process has found."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_ted.errors import VerificationError

#: Columns of a table that goes into a file or a pipe.
WIDTH = 160


@dataclass(frozen=True)
class ParameterRow:
    """One parameter.

    Attributes:
        name: Qualified.
        gradient: Norm of the gradient's difference, relative to that of one process's gradient.
        update: Norm of the difference after the step, relative to that of one process's update; None without a step.
        factor: The number that one process's gradient would have to be multiplied by, to come nearest.
        ok: Whether both are within their tolerances.
        cause: What is likely to be the reason; empty where it is right.

    """

    name: str
    gradient: float
    update: float | None
    factor: float
    ok: bool
    cause: str = ""


@dataclass(frozen=True)
class VerificationReport:
    """Whether a module computes under a layout what it computes in one process.

    Attributes:
        ok: Whether all is right.
        layout: Under which layout.
        loss: Relative difference of the loss; None without one.
        outputs: The largest relative difference of what ``training_step`` returned.
        module: The first module whose output differs; empty if none is seen to.
        norm: The largest relative difference of the optimizers' gradient norms.
        rows: All trained parameters.
        tolerance: Of gradients; others follow from it.
        causes: What is likely to be wrong, the most likely first.
        notes: What had to be done to be able to compare, and what was warned of.

    """

    ok: bool
    layout: str
    loss: float | None
    outputs: float
    module: str
    norm: float
    rows: tuple[ParameterRow, ...]
    tolerance: float
    causes: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def raise_if_wrong(self) -> None:
        """Raise what is wrong.

        Raises:
            VerificationError: If something is.

        """
        if not self.ok:
            raise VerificationError(str(self))

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)

    def __str__(self) -> str:
        text = StringIO()
        self.print(Console(width=WIDTH, file=text))
        return text.getvalue().rstrip()

    def print(self, console: Console) -> None:
        """Print it as a table."""
        wrong = [row for row in self.rows if not row.ok]
        console.print(
            f"{self.layout}: {'equals one process' if self.ok else 'does NOT equal one process'}", highlight=False
        )
        table = Table("", "relative difference", "tolerance")
        if self.loss is not None:
            table.add_row("loss", _number(self.loss), _number(self.tolerance))
        table.add_row("outputs", _number(self.outputs), _number(self.tolerance))
        table.add_row("norm of gradients", _number(self.norm), _number(self.tolerance))
        worst = max(self.rows, key=lambda row: row.gradient, default=None)
        if worst is not None:
            table.add_row(f"worst of {len(self.rows)} gradients", _number(worst.gradient), _number(self.tolerance))
        console.print(table)
        if self.module:
            console.print(f"The first module whose output differs: {self.module}", highlight=False)
        if wrong:
            table = Table("parameter", "gradient", "update", "factor", "likely cause")
            for row in wrong:
                update = "" if row.update is None else _number(row.update)
                table.add_row(row.name, _number(row.gradient), update, f"{row.factor:.4g}", row.cause)
            console.print(table)
        for title, texts in (("likely", self.causes), ("note", self.notes)):
            for text in texts:
                console.print(f"{title}: {text}", highlight=False)


def _number(value: float) -> str:
    return f"{value:.1e}"
