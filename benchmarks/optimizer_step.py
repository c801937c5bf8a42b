"""What the optimizer step costs: memory and time of tiled and untiled steps, the spike by experts, overlapped reduction.

``python -m benchmarks.optimizer_step`` prints three tables and writes them to ``benchmarks/results/optimizer_step.json``,
and one as a picture beside it. See ``benchmarks/README.md`` for what is counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import overlap, spike
from benchmarks.fresh import in_fresh_processes
from benchmarks.owned_slice import MOVED_TRAFFIC, NEEDED_TRAFFIC, OFFLOAD_TRAFFIC, TORCH, measure_slice, slice_sizes
from lightning_ted.optim.reducer import BUCKET_SIZE

RESULTS = Path(__file__).parent / "results" / "optimizer_step.json"
TILES = (2**18, 2**20, 2**22, 2**24, None)
OFFLOAD_TILE = 2**22
#: Bytes that a step may take beside its tile.
SLACK = 2_000_000
BASELINE = "torch fused"
#: Of a copy's bandwidth.
BANDWIDTH_TARGET = 0.85
PARTS = ("slice", "spike", "overlap")


def variants(tiles: Sequence[int | None]) -> dict[str, dict[str, Any]]:
    """What is compared, by title; see :func:`benchmarks.owned_slice.make_slice`."""
    found: dict[str, dict[str, Any]] = {f"torch {name}": {"implementation": name} for name in TORCH}
    for tile in tiles:
        found["untiled" if tile is None else f"tiles of {tile}"] = {"tile_size": tile}
    found[f"offload, {OFFLOAD_TILE}"] = {"tile_size": OFFLOAD_TILE, "offload": True}
    return found


# -- a slice ------------------------------------------------------------------------------------------------------------


def slice_table(
    size: int, device: str, tiles: Sequence[int | None], steps: int, repeats: int, threads: Sequence[int]
) -> dict[str, Any]:
    """All rows. The variants take turns, so that a busy minute on the machine does not fall on one of them alone."""
    sizes, kinds = slice_sizes(size), variants(tiles)
    runs: dict[str, list[dict[str, Any]]] = {title: [] for title in kinds}
    for _ in range(repeats):
        for title, variant in kinds.items():
            note(f"slice of {size / 1e6:g} M on {device}: {title}")
            arguments = {"sizes": sizes, "variant": variant, "device": device, "steps": steps, "threads": threads}
            runs[title] += in_fresh_processes(measure_slice, arguments)
    rows = {title: slice_row(found, size, kinds[title]) for title, found in runs.items()}
    for title, row in rows.items():
        row |= slice_verdict(row, rows[BASELINE], kinds[title], size)
    return {"size": size, "sizes": sizes, "device": device, "rows": rows}


def slice_row(runs: Sequence[Mapping[str, Any]], size: int, variant: Mapping[str, Any]) -> dict[str, Any]:
    """One row from several runs of it."""
    row: dict[str, Any] = {"extra_bytes": median(run["extra_bytes"] for run in runs)}
    for kind in ("cpu", "wall"):
        row[kind] = {count: median(s for run in runs for s in run[kind][count]) for count in runs[0][kind]}
    row["checksums"] = sorted({run["checksum"] for run in runs})
    fastest = min(row["wall"].values())
    if variant.get("offload"):
        row["offload_bytes_per_second"] = OFFLOAD_TRAFFIC * size / fastest
    elif "copy_bandwidth" in runs[0]:
        row["copy_bandwidth"] = bandwidth = median(run["copy_bandwidth"] for run in runs)
        row["bandwidth_share"] = MOVED_TRAFFIC * size / fastest / bandwidth
        row["needed_bandwidth_share"] = NEEDED_TRAFFIC * size / fastest / bandwidth
    return row


def slice_verdict(
    row: Mapping[str, Any], baseline: Mapping[str, Any], variant: Mapping[str, Any], size: int
) -> dict[str, Any]:
    """Ratios to torch's fused step, and which targets a row of this package meets."""
    ratios = {kind: {n: row[kind][n] / baseline[kind][n] for n in row[kind]} for kind in ("cpu", "wall")}
    found: dict[str, Any] = {"ratios": ratios, "same_bits": row["checksums"] == baseline["checksums"]}
    if "tile_size" not in variant:
        return found
    met = {"bits": found["same_bits"]}
    if not variant.get("offload"):
        found["allowed_bytes"] = 4 * (variant["tile_size"] or size) + SLACK
        met["memory"] = row["extra_bytes"] <= found["allowed_bytes"]
    if variant["tile_size"] is not None and not variant.get("offload"):
        met["time"] = all(ratio <= 1.0 for ratio in ratios["wall"].values())
        if "bandwidth_share" in row:
            met["bandwidth"] = row["bandwidth_share"] >= BANDWIDTH_TARGET
    return found | {"meets_targets": met}


def slice_lines(table: Mapping[str, Any]) -> Iterator[str]:
    """The table as text."""
    rows = table["rows"]
    counts = list(rows[BASELINE]["wall"])
    yield f"\nA step of {table['size'] / 1e6:g} M parameters on {table['device']} (ratios to {BASELINE})"
    by_threads = " ".join(f"{f'wall s, {n}T':>11} {'ratio':>5} {f'CPU s, {n}T':>10} {'ratio':>5}" for n in counts)
    yield f"{'':18} {'extra MB':>8} {'allowed':>8} {by_threads} bits  targets"
    for title, row in rows.items():
        allowed = f"{row['allowed_bytes'] / 1e6:.1f}" if "allowed_bytes" in row else "-"
        times = " ".join(
            f"{row['wall'][n]:11.4f} {row['ratios']['wall'][n]:5.2f} {row['cpu'][n]:10.4f} {row['ratios']['cpu'][n]:5.2f}"
            for n in counts
        )
        missed = [name for name, met in row.get("meets_targets", {}).items() if not met]
        verdict = "" if "meets_targets" not in row else f"NOT met: {', '.join(missed)}" if missed else "met"
        bits = "same" if row["same_bits"] else "other"
        yield f"{title:18} {row['extra_bytes'] / 1e6:8.1f} {allowed:>8} {times} {bits:5} {verdict}".rstrip()
        if "offload_bytes_per_second" in row:
            yield f"{'':18} masters and moments moved there and back: {row['offload_bytes_per_second'] / 1e9:.1f} GB/s"
        if "bandwidth_share" in row:
            yield (
                f"{'':18} {row['bandwidth_share']:.0%} of a copy's {row['copy_bandwidth'] / 1e12:.2f} TB/s; "
                f"{row['needed_bandwidth_share']:.0%} counting only what no step can do without"
            )


# -- the spike ----------------------------------------------------------------------------------------------------------


def spike_table(base: spike.Base, world: int, experts: Sequence[int], tile: int) -> dict[str, Any]:
    """Predicted and measured, by number of experts."""
    rows = []
    for count in experts:
        sizes = base.rank_sizes(count, world)
        row = {"experts": count, "slice": sum(sizes), "tile_bytes": 4 * tile}
        row["predicted_bytes"] = base.predicted_spike(count, world)
        for key, size in (("untiled_bytes", None), ("tiled_bytes", tile)):
            note(f"spike of {count} experts, {'untiled' if size is None else 'tiled'}")
            arguments = {"sizes": sizes, "variant": {"tile_size": size}, "device": "cpu", "steps": 0, "threads": []}
            row[key] = in_fresh_processes(measure_slice, arguments)[0]["extra_bytes"]
        rows.append(row)
    return {"base": base.num_params, "layers": base.layers, "width": base.width, "world": world, "rows": rows}


# -- overlap ------------------------------------------------------------------------------------------------------------


def overlap_table(bucket_sizes: Sequence[int], passes: int) -> dict[str, Any]:
    """Of every layout, both stages and all sizes of buckets."""
    rows = []
    for layout in overlap.LAYOUTS:
        note(f"overlap under {overlap.TITLES[layout]}")
        arguments = {"layout": layout, "zero_stages": [1, 2], "bucket_sizes": bucket_sizes, "passes": passes}
        rows += overlap.merge(in_fresh_processes(overlap.overlap_of_rank, arguments, ranks=overlap.RANKS, threads=1))
    return {"passes": passes, "rows": rows}


# -- all of it ----------------------------------------------------------------------------------------------------------


def note(text: str) -> None:
    print(f"running {text} ...", file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    cpu = platform.processor()
    if sys.platform == "linux":
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    found = {"cpu": cpu, "cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version()}
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = os.cpu_count() or 1
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--size", type=lambda text: int(float(text)), default=100_000_000, help="parameters of the slice"
    )
    parser.add_argument("--steps", type=int, default=7, help="steps that are measured, in each run")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each row of the slice")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, every}), help="on the CPU")
    parser.add_argument("--layers", type=int, default=4, help="of the base model of the spike; even")
    parser.add_argument("--width", type=int, default=512, help="of the base model of the spike")
    parser.add_argument("--experts", type=int, nargs="+", default=list(spike.EXPERTS))
    parser.add_argument("--world", type=int, default=spike.WORLD, help="ranks that share the spike's model")
    parser.add_argument("--tile", type=int, default=spike.TILE, help="elements of a tile, in the spike")
    parser.add_argument("--bucket-sizes", type=int, nargs="+", default=[BUCKET_SIZE, 2**20, 2**18], help="in elements")
    parser.add_argument("--passes", type=int, default=5, help="backward passes in which overlap is counted")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file; the picture lies beside it")
    return parser.parse_args()


def draw(table: Mapping[str, Any], base: spike.Base, path: Path) -> None:
    """Make the picture, or say how it could be."""
    try:
        spike.draw(table["rows"], base, table["world"], path)
    except ImportError:
        print(f"No picture: matplotlib is missing. HINT: `pip install -e '.[plots]'` for {path}.", file=sys.stderr)


def main() -> None:
    args = arguments()
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    results: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.optimizer_step", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": machine(),
        "settings": {"steps": args.steps, "repeats": args.repeats},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for device in devices if "slice" in args.parts else []:
        threads = args.threads if device == "cpu" else [1]
        table = slice_table(args.size, device, TILES, args.steps, args.repeats, threads)
        results[f"slice_{device}"] = table
        print("\n".join(slice_lines(table)), flush=True)
    if "spike" in args.parts:
        base = spike.Base(args.layers, args.width)
        results["spike"] = table = spike_table(base, args.world, args.experts, args.tile)
        print(f"\nThe spike of a step, {base.num_params / 1e6:.1f} M base parameters on {args.world} ranks")
        print("\n".join(spike.lines(table["rows"])), flush=True)
        draw(table, base, args.out.with_suffix(".png"))
    if "overlap" in args.parts:
        results["overlap"] = table = overlap_table(args.bucket_sizes, args.passes)
        print(f"\nReductions started while backward ran, {overlap.RANKS} ranks")
        print("\n".join(overlap.lines(table["rows"])), flush=True)
    args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
