"""The paper's experiment (TED, arXiv 2303.06318): without its two savings of communication, with each, and with both.

``python -m benchmarks.ablation`` trains one decoder on two "nodes" of two processes, which are network namespaces joined by
a link of 1 Gbit/s, prints tables and writes ``benchmarks/results/ablation.json``, ``.txt`` and ``.png``. Where the machine
has no such namespaces, it says why and writes nothing. See ``benchmarks/README.md`` for what is counted.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks import ablation_rank, ablation_report
from benchmarks.ablation_rank import MAIN, RANKS, RANKS_PER_NODE, VARIANTS
from benchmarks.fresh import in_fresh_processes
from benchmarks.namespaces import ADDRESSES, INTERFACE, NodesUnavailableError, TwoNodes
from benchmarks.optimizer_step import machine, note

RESULTS = Path(__file__).parent / "results" / "ablation.json"
HEAD_WIDTH = 32


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whole, wide = at_least(1), multiple_of(2 * HEAD_WIDTH)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rate", type=positive, default=1000.0, help="of the link, in Mbit/s, each way")
    parser.add_argument("--widths", type=wide, nargs="+", default=[128, 64, 256], help="of the model")
    parser.add_argument("--layers", type=multiple_of(2), default=4, help="every second one with experts")
    parser.add_argument("--experts", type=multiple_of(2), default=8, help="of each such layer")
    parser.add_argument("--top-k", type=whole, default=1, help="experts of each token")
    parser.add_argument("--sequence", type=at_least(2), default=64, help="tokens of a sequence")
    parser.add_argument("--sequences", type=whole, default=128, help="of each data rank in a step")
    parser.add_argument("--chunks", type=whole, default=2, help="of the tokens, in the variant that has them")
    parser.add_argument("--warmup", type=whole, default=2, help="steps of each run in which losses are compared")
    parser.add_argument("--steps", type=whole, default=8, help="steps of each variant that are measured, in each run")
    parser.add_argument("--repeats", type=whole, default=2, help="runs, each in fresh processes")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file; text and picture lie beside it")
    args = parser.parse_args(given)
    if args.top_k > args.experts:
        parser.error(f"argument --top-k: {args.top_k} is more than the {args.experts} experts of --experts")
    return args


def at_least(least: int) -> Callable[[str], int]:
    """Reads an integer."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least {least}")
        return int(text)

    return read


def multiple_of(divisor: int) -> Callable[[str], int]:
    """Reads a positive integer that ranks and heads share out evenly."""

    def read(text: str) -> int:
        if not text.isdecimal() or not int(text) or int(text) % divisor:
            raise argparse.ArgumentTypeError(f"{text!r} must be a positive multiple of {divisor}")
        return int(text)

    return read


def positive(text: str) -> float:
    """Reads a number."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a positive number")
    return number


def shape_of(args: argparse.Namespace, width: int) -> dict[str, int]:
    """The decoder's; see :class:`examples.decoder.model.DecoderConfig`."""
    shape = {"d_model": width, "num_heads": width // HEAD_WIDTH, "ffn_width": 4 * width, "expert_width": 4 * width}
    shape |= {"num_layers": args.layers, "num_experts": args.experts, "top_k": args.top_k}
    return shape | {"sequence_length": args.sequence}


def measure(args: argparse.Namespace, width: int, variants: Sequence[str]) -> dict[str, Any]:
    """The rows of the model of one width, from ``args.repeats`` runs.

    Raises:
        NodesUnavailableError: If the machine cannot have two nodes.

    """
    # A wider model sends as many bytes, for fewer tokens: what differs is how much is computed meanwhile.
    sequences = max(args.sequences * args.widths[0] // width, 1)
    given = {"names": variants, "shape": shape_of(args, width), "sequences": sequences}
    given |= {"chunks": args.chunks, "warmup": args.warmup, "steps": args.steps}
    runs = []
    for repeat in range(args.repeats):
        with TwoNodes(args.rate) as nodes:
            note(f"width {width}, {len(variants)} variants in turns, {repeat + 1} of {args.repeats}")
            runs.append(in_fresh_processes(ablation_rank.run_rank, given, RANKS, 1, within(nodes)))
    return {**given, "width": width, "parameters": runs[0][0]["parameters"], "rows": ablation_report.merge(runs)}


def within(nodes: TwoNodes) -> Callable[[int], list[str]]:
    """Where each rank runs, and by which interface it finds the others."""
    found = ["env", f"MASTER_ADDR={ADDRESSES[0]}", f"GLOO_SOCKET_IFNAME={INTERFACE}"]
    return lambda rank: [*nodes.within(rank // RANKS_PER_NODE), *found]


def describe(model: Mapping[str, Any]) -> str:
    """A model in words."""
    shape = model["shape"]
    return (
        f"{shape['num_layers']} layers of width {model['width']}, {shape['num_experts']} experts in every second one, "
        f"top-{shape['top_k']}, {model['parameters'] / 1e6:.1f} M parameters; "
        f"2 x {model['sequences']} x {shape['sequence_length']} tokens a step"
    )


def main() -> None:
    args = arguments()
    models: list[dict[str, Any]] = []
    try:
        for width in args.widths:
            main_only = [name for name in MAIN if name in args.variants]
            models.append(measure(args, width, main_only if models and main_only else args.variants))
    except NodesUnavailableError as error:
        print(f"Skipped: two nodes on one machine need network namespaces with a link between them, but {error}.")
        return
    command = shlex.join(["python", "-m", "benchmarks.ablation", *sys.argv[1:]])
    link = f"two nodes of {RANKS_PER_NODE} processes, joined by {args.rate:g} Mbit/s each way"
    where = machine()
    text = [command, f"{date.today()}, torch {where['torch']}, {where['cpu']}, {os.cpu_count()} cores", link]
    for model in models:
        text += ["", describe(model), *ablation_report.lines(model["rows"]), "", ablation_report.verdict(model["rows"])]
    print("\n".join(text))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".txt").write_text("\n".join(text) + "\n")
    results = {"command": command, "date": date.today().isoformat(), "machine": where, "rate_mbit": args.rate}
    args.out.write_text(json.dumps(results | {"models": models}, indent=2) + "\n")
    path = args.out.with_suffix(".png")
    try:
        ablation_report.draw(models[0]["rows"], f"{describe(models[0])}\n{link}, {os.cpu_count()} cores", path)
    except ImportError:
        print(f"No picture: matplotlib is missing. HINT: `pip install -e '.[plots]'` for {path}.", file=sys.stderr)


if __name__ == "__main__":
    main()
