"""What the ranks of the benchmark of checkpoints have measured, as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median

from benchmarks.checkpoint_rank import FORMS

#: Of every time that something was done, in every rank: what was measured, by name.
Ranks = Sequence[Sequence[Mapping[str, float]]]
#: By form and by what is done.
Run = Mapping[str, Mapping[str, Ranks]]

#: What a save and a load are said to take; ratios are of these.
SAVE, LOAD = ("returned", "stored", "peak"), ("seconds", "peak")


def merge(runs: Sequence[Run]) -> dict[str, dict[str, dict[str, float]]]:
    """The rows of the table: by form, of ``save`` and ``load``, medians and, where there is one to compare with, ratios."""
    medians = [
        {form: {kind: of_ranks(ranks) for kind, ranks in done.items()} for form, done in run.items()} for run in runs
    ]
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for form in medians[0]:
        rows[form] = {}
        for kind in medians[0][form]:
            found = [run[form][kind] for run in medians]
            row = rows[form][kind] = {key: median(one[key] for one in found) for key in found[0]}
            against = FORMS[form].against if form in FORMS else None
            if against in medians[0]:
                pairs = [(run[form][kind], run[against][kind]) for run in medians]
                for key in SAVE if kind == "save" else LOAD:
                    row[f"{key}_ratio"] = median(own[key] / theirs[key] for own, theirs in pairs)
    return rows


def of_ranks(ranks: Ranks) -> dict[str, float]:
    """Of the rank that needs most; the median of the repeats."""
    together = list(zip(*ranks, strict=True))
    return {key: median(max(one[key] for one in repeat) for repeat in together) for key in together[0][0]}


def lines(rows: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Iterator[str]:
    """The tables as text."""
    yield f"{'save':30} {'blocks s':>8} {'ratio':>5} {'on disk s':>9} {'ratio':>5} {'peak MB':>8} {'ratio':>5} {'files MB':>8}"
    for form, row in rows.items():
        if "save" in row:
            one = row["save"]
            times = f"{one['returned']:8.3f} {ratio(one, 'returned')} {one['stored']:9.3f} {ratio(one, 'stored')}"
            sizes = f"{one['peak'] / 1e6:8.1f} {ratio(one, 'peak')} {one['files'] / 1e6:8.1f}"
            yield f"{title(form):30} {times} {sizes}"
    yield ""
    yield f"{'load':30} {'s':>8} {'ratio':>5} {'peak MB':>8} {'ratio':>5}"
    for form, row in rows.items():
        if "load" in row:
            one = row["load"]
            yield (
                f"{title(form):30} {one['seconds']:8.3f} {ratio(one, 'seconds')} {one['peak'] / 1e6:8.1f} {ratio(one, 'peak')}"
            )


def title(form: str) -> str:
    return FORMS[form].title if form in FORMS else form


def ratio(row: Mapping[str, float], key: str) -> str:
    """To Lightning's."""
    return f"{row[f'{key}_ratio']:5.2f}" if f"{key}_ratio" in row else f"{'-':>5}"
