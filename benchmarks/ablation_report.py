"""What the ranks of the ablation have measured, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

from benchmarks.ablation_rank import BASELINE, BOTH, RANKS_PER_NODE, VARIANTS

#: The paper's: 26 % faster than without both (arXiv 2303.06318).
TARGET = 1.26
#: The parts of a step, with their titles; what is in none of these is the rest.
PARTS = {
    "compute": "compute",
    "all_to_all": "all-to-all",
    "all_reduce": "all-reduce",
    "all_gather": "all-gather",
    "reduce_scatter": "red.-scatter",
    "gradients": "gradients",
    "weights": "weights",
    "rest": "rest",
}

#: What each rank has measured of one variant in one run.
Ranks = Sequence[Mapping[str, Any]]


# -- arithmetic ---------------------------------------------------------------------------------------------------------


def merge(runs: Sequence[Ranks]) -> dict[str, dict[str, Any]]:
    """The rows of the table from several runs, each with what :func:`measure_variants` returns on every rank."""
    names = list(runs[0][0]["variants"])
    rows = {name: merge_variant([[rank["variants"][name] for rank in ranks] for ranks in runs]) for name in names}
    for name, row in rows.items():
        row["title"], row["losses"] = VARIANTS[name].title, runs[0][0]["losses"][name]
        if BASELINE in rows:
            # Step by step, as they have taken turns, so that a slow minute of the machine is in both.
            pairs = zip(rows[BASELINE]["seconds_of_steps"], row["seconds_of_steps"], strict=True)
            ratios = [baseline / own for baseline, own in pairs]
            row["speedup"], row["speedup_quartiles"] = median(ratios), quartiles(ratios)
    return rows


def merge_variant(runs: Sequence[Ranks]) -> dict[str, Any]:
    """One row: its steps, the split of the median one, and what was sent and kept, the mean over ranks and steps.

    The parts have the shares that they have of all steps together, so that their sum is the median step.
    """
    steps = [step for ranks in runs for rank in ranks for step in rank["steps"]]
    together = [parts for ranks in runs for parts in zip(*(rank["steps"] for rank in ranks), strict=True)]
    seconds = [max(step["seconds"] for step in parts) for parts in together]
    scale = median(seconds) / fmean(step["seconds"] for step in steps)
    split = {part: mean * scale for part, mean in mean_split(steps).items()}
    nodes = [step for ranks in runs for rank in ranks[::RANKS_PER_NODE] for step in rank["steps"]]
    return {
        "seconds": median(seconds),
        "quartiles": quartiles(seconds),
        "seconds_of_steps": seconds,
        "split": split,
        "cpu_seconds": median(sum(step["cpu"] for step in parts) for parts in together),
        "link_bytes_per_node": fmean(step["link"] for step in nodes),
        "peak_bytes": median(max(rank["peak"] for rank in ranks) for ranks in runs),
        **{key: means([step[key] for step in steps]) for key in ("bytes", "calls", "kept")},
    }


def mean_split(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean seconds by part; compute is what is left where a rank is not held up."""
    blocked = means([step["blocked"] for step in steps])
    split = dict.fromkeys(PARTS, 0.0)
    split["compute"] = fmean(step["seconds"] for step in steps) - sum(blocked.values())
    for purpose, mean in blocked.items():
        split[purpose if purpose in PARTS else "rest"] += mean
    return split


def means(counts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """By key; what is missing is 0."""
    return {key: sum(one.get(key, 0) for one in counts) / len(counts) for key in sorted(set().union(*counts))}


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the last."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, last = quantiles(values, n=4, method="inclusive")
    return first, last


# -- text ---------------------------------------------------------------------------------------------------------------


def lines(rows: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The tables of one model as text."""
    parts = [part for part in PARTS if any(row["split"][part] >= 5e-4 for row in rows.values())]
    heads = " ".join(f"{PARTS[part]:>12}" for part in parts)
    yield f"{'':26} {'step s':>6} {'quartiles':>11} {'ratio':>5} {'quartiles':>11} {heads}"
    for row in rows.values():
        split = " ".join(f"{row['split'][part]:12.3f}" for part in parts)
        ratio = f"{row['speedup']:5.2f} {span(row['speedup_quartiles'])}" if "speedup" in row else f"{'-':>5} {'-':>11}"
        yield f"{row['title']:26} {row['seconds']:6.3f} {span(row['quartiles'])} {ratio} {split}"
    yield ""
    yield f"{'':26} {'CPU s':>6} {'link MB':>8} {'sent MB':>8} {'kept MB':>8} {'peak MB':>8}  losses"
    for row in rows.values():
        numbers = (row["link_bytes_per_node"], sum(row["bytes"].values()), sum(row["kept"].values()), row["peak_bytes"])
        sizes = " ".join(f"{number / 1e6:8.1f}" for number in numbers)
        yield f"{row['title']:26} {row['cpu_seconds']:6.2f} {sizes}  {row['losses']}"
    yield from traffic_lines(rows)


def traffic_lines(rows: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What was sent, phase by phase, by kind and axis; but for what is less than a hundredth of all."""
    yield "\nMB sent per rank and step, by kind and axis: forward / recomputation / backward / optimizer (calls)"
    phases = ("forward", "recomputation", "backward", "optimizer")
    for row in rows.values():
        yield f"  {row['title']}"
        for pair in sorted({key.rpartition("/")[0] for key in row["bytes"]}):
            sent = [row["bytes"].get(f"{pair}/{phase}", 0) for phase in phases]
            if sum(sent) < sum(row["bytes"].values()) / 100:
                continue
            calls = sum(row["calls"].get(f"{pair}/{phase}", 0) for phase in phases)
            yield f"    {pair:28} {' / '.join(f'{number / 1e6:.2f}' for number in sent)} ({calls:g})"


def span(pair: Sequence[float]) -> str:
    return f"{pair[0]:5.2f}-{pair[1]:5.2f}"


def verdict(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Whether the paper's figure is reached."""
    if not {BASELINE, BOTH} <= set(rows):
        return f"The target is of `{BASELINE}` and `{BOTH}`, which have not both been run."
    speedup = rows[BOTH]["speedup"]
    return f"both: {speedup:.2f} times faster than the baseline; target {TARGET}: {'met' if speedup >= TARGET else 'NOT met'}"


# -- picture ------------------------------------------------------------------------------------------------------------


def draw(rows: Mapping[str, Mapping[str, Any]], subtitle: str, path: Path) -> None:
    """A step of every variant, a bar of its parts.

    Raises:
        ImportError: Without matplotlib.

    """
    from matplotlib.figure import Figure  # no window, no global state

    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.add_subplot()
    titles = [row["title"].replace(", ", ",\n") for row in rows.values()]
    floor = [0.0] * len(rows)
    colors = {part: f"C{index}" for index, part in enumerate(PARTS)} | {"compute": "0.8", "rest": "0.4"}
    for part, title in PARTS.items():
        heights = [row["split"][part] for row in rows.values()]
        if max(heights) >= 5e-4:
            axes.bar(titles, heights, bottom=floor, label=title.replace("red.", "reduce"), color=colors[part])
        floor = [low + height for low, height in zip(floor, heights, strict=True)]
    for index, row in enumerate(rows.values()):
        ratio = f"\n{row['speedup']:.2f}x" if "speedup" in row else ""
        axes.text(index, floor[index], f"{row['seconds']:.2f} s{ratio}", ha="center", va="bottom", fontsize="small")
    axes.set_ylim(0, 1.15 * max(floor))
    axes.set_ylabel("seconds of a step, mean over ranks")
    axes.tick_params(axis="x", labelsize="small")
    axes.set_title(subtitle, fontsize="medium")
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=120)
