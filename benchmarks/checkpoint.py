"""What it costs to save and to resume, under each form of checkpoint, beside Lightning's ``ModelParallelStrategy``.

``python -m benchmarks.checkpoint`` saves and resumes the same decoder with its optimizer on four processes, prints tables and
writes ``benchmarks/results/checkpoint.json`` and ``.txt``. See ``benchmarks/README.md`` for what is counted.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks import checkpoint_rank, checkpoint_report
from benchmarks.ablation import HEAD_WIDTH, at_least, multiple_of
from benchmarks.checkpoint_rank import FORMS, RANKS, THEIR_FILE, config_of
from benchmarks.fresh import in_fresh_processes
from benchmarks.optimizer_step import machine, note

RESULTS = Path(__file__).parent / "results" / "checkpoint.json"
#: Of weights and AdamW's moments, for each parameter.
BYTES = 12
BARE = "the bytes alone"


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whole = at_least(1)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--width", type=multiple_of(2 * HEAD_WIDTH), default=384, help="of the model")
    parser.add_argument("--layers", type=multiple_of(2), default=4, help="every second one with experts")
    parser.add_argument("--experts", type=multiple_of(RANKS), default=8, help="of each such layer")
    parser.add_argument("--repeats", type=whole, default=3, help="saves and loads of each form in each run")
    parser.add_argument("--runs", type=whole, default=1, help="in each, each form in fresh processes")
    parser.add_argument("--cold", action="store_true", help="read from disk, not from the system's cache of it")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written; by default one for temporary files")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file; the text lies beside it")
    args = parser.parse_args(given)
    for form in args.forms:
        reads = FORMS[form].reads
        if reads is not None and reads not in args.forms:
            parser.error(f"argument --forms: {form} reads what {reads} writes, which is not among them")
    return args


def shape_of(args: argparse.Namespace) -> dict[str, int]:
    """The decoder's; see :class:`examples.decoder.model.DecoderConfig`."""
    width = args.width
    shape = {"d_model": width, "num_heads": width // HEAD_WIDTH, "ffn_width": 4 * width, "expert_width": 4 * width}
    return shape | {"num_layers": args.layers, "num_experts": args.experts}


def measure(args: argparse.Namespace, folder: str) -> checkpoint_report.Run:
    """One run: each form is written, and read, by processes of its own."""
    given = {"shape": shape_of(args), "folder": folder, "repeats": args.repeats}
    found: dict[str, dict[str, Any]] = {}

    def run(form: str, kind: str, function: Callable[..., Any], more: dict[str, Any]) -> None:
        note(f"{kind}: {checkpoint_report.title(form)}")
        found.setdefault(form, {})[kind] = in_fresh_processes(function, more, RANKS, threads=1)

    size = BYTES * config_of(given["shape"]).num_params()
    run(BARE, "save", checkpoint_rank.write_rank, {"size": size, "folder": folder, "repeats": args.repeats})
    for form in args.forms:
        if FORMS[form].writes:
            run(form, "save", checkpoint_rank.save_rank, {**given, "form": form})
    for form in args.forms:
        if FORMS[form].reads is not None:
            run(form, "load", checkpoint_rank.load_rank, {**given, "form": form, "cold": args.cold})
    require_same_weights(args.forms, folder)
    return found


def require_same_weights(forms: Sequence[str], folder: str) -> None:
    """See that both strategies have saved the same weights.

    Raises:
        RuntimeError: If not.

    """
    if {"file", THEIR_FILE} <= set(forms):
        own, theirs = (
            checkpoint_rank.weights_of(next((Path(folder) / form).iterdir())) for form in ("file", THEIR_FILE)
        )
        other = [name for name in own.keys() | theirs.keys() if name not in own or name not in theirs]
        other += [name for name in own.keys() & theirs.keys() if not torch.equal(own[name], theirs[name])]
        if other:
            raise RuntimeError(f"The two strategies have not saved the same weights: '{min(other)}' differs.")


def file_system(folder: Path) -> str:
    """Of what kind it is."""
    found = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    holders = [(len(point), kind) for point, kind in found if folder.resolve().is_relative_to(point)]
    return max(holders)[1]


def main() -> None:
    args = arguments()
    runs = []
    where = args.folder or Path(tempfile.gettempdir())
    for _ in range(args.runs):
        with tempfile.TemporaryDirectory(dir=where) as folder:
            runs.append(measure(args, folder))
    rows = checkpoint_report.merge(runs)
    config = config_of(shape_of(args))
    command = shlex.join(["python", "-m", "benchmarks.checkpoint", *sys.argv[1:]])
    here = machine()
    text = [
        command,
        f"{date.today()}, torch {here['torch']}, {here['cpu']}, {os.cpu_count()} cores, {file_system(where)}",
        f"{config.num_params() / 1e6:.1f} M parameters on {RANKS} processes; with AdamW's state "
        f"{BYTES * config.num_params() / 1e6:.1f} MB; read {'from disk' if args.cold else 'from the cache'}",
        "",
        *checkpoint_report.lines(rows),
    ]
    print("\n".join(text))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".txt").write_text("\n".join(text) + "\n")
    settings = {"repeats": args.repeats, "runs": args.runs, "cold": args.cold, "file_system": file_system(where)}
    results = {"command": command, "date": date.today().isoformat(), "machine": here, "settings": settings}
    results |= {"parameters": config.num_params(), "rows": rows, "measured": runs}
    args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
