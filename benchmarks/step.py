"""What one training step costs under each layout: bytes sent, CPU seconds, memory; beside one process and Lightning's DDP.

``python -m benchmarks.step`` trains two small decoders, each layout in fresh processes through a ``Trainer`` on the same
global batches, prints a table and writes ``benchmarks/results/step.json``. See ``benchmarks/README.md`` for what is counted.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from benchmarks.fresh import in_fresh_processes
from examples.decoder.lightning_module import DecoderModule
from examples.decoder.model import DecoderConfig
from examples.decoder.text import split
from lightning_ted import TEDStrategy

RANKS = 4
GLOBAL_BATCH, SEQUENCE = 16, 256
RESULTS = Path(__file__).parent / "results" / "step.json"
MODELS = {"gpt": DecoderConfig.gpt(), "qwen3_moe": DecoderConfig.qwen3_moe()}


@dataclass(frozen=True)
class Layout:
    """A row of the table.

    Attributes:
        title: What the table calls it.
        ranks: Number of processes.
        data: Data-parallel degree.
        ted: Arguments of ``TEDStrategy``; None for Lightning's own strategies.

    """

    title: str
    ranks: int = RANKS
    data: int = RANKS
    ted: dict[str, Any] | None = None


LAYOUTS = {
    "one": Layout("one process", ranks=1, data=1),
    "ddp": Layout("Lightning's DDP"),
    "tp2_ep2": Layout(
        "tensor 2 x expert 2, expert-tensor 2",
        data=2,
        ted={"tensor_parallel_size": 2, "expert_parallel_size": 2, "expert_tensor_parallel_size": 2},
    ),
    "tp2_ep4_folded": Layout(
        "tensor 2 x expert 4, folded",
        data=2,
        ted={"tensor_parallel_size": 2, "expert_parallel_size": 4, "expert_tensor_parallel_size": 1},
    ),
    "ep4": Layout("expert 4", ted={"expert_parallel_size": 4}),
}


@dataclass(frozen=True)
class Target:
    """Upper bounds of a cell; None where there is none."""

    megabytes: float | None = None
    cpu_ratio: float | None = None
    memory_megabytes: float | None = 500.0


TARGETS = {
    ("gpt", "tp2_ep2"): Target(52),
    ("gpt", "tp2_ep4_folded"): Target(),
    ("gpt", "ep4"): Target(),
    ("qwen3_moe", "tp2_ep2"): Target(65, 1.40),
    ("qwen3_moe", "tp2_ep4_folded"): Target(52),
    ("qwen3_moe", "ep4"): Target(30, 1.20),
}


@dataclass
class RankResult:
    """What one rank measured; lists have one entry for each measured step.

    Attributes:
        cpu: CPU seconds, user and system, of all threads.
        traffic: Bytes sent by ``"kind/axis"``.
        calls: Collectives by ``"kind/axis"``.
        peak: Highest resident memory in bytes, less that after the imports.
        loss: The first training loss; says whether two rows compute the same.

    """

    cpu: list[float] = field(default_factory=list)
    traffic: list[dict[str, int]] = field(default_factory=list)
    calls: list[dict[str, int]] = field(default_factory=list)
    peak: int = 0
    loss: float = 0.0


# -- one rank -----------------------------------------------------------------------------------------------------------


class Decoder(DecoderModule):
    """The example's module with the fused optimizer, alike in all rows, and without a schedule."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate, fused=True)


class Meter(L.Callback):
    """Measures whole steps, from batch to batch, after some that are not counted."""

    def __init__(self, warmup: int, result: RankResult) -> None:
        self.warmup = warmup
        self.result = result
        self._start: float | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx >= self.warmup and self._start is None:
            self._start = cpu_seconds()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            self.result.loss = float(outputs["loss"])
        if self._start is None:
            return
        now = cpu_seconds()
        self.result.cpu.append(now - self._start)
        self._start = now
        if isinstance(trainer.strategy, TEDStrategy):
            sent = trainer.strategy.communication
            self.result.traffic.append({f"{kind}/{axis}": n for (kind, axis), n in sorted(sent.bytes.items())})
            self.result.calls.append({f"{kind}/{axis}": n for (kind, axis), n in sorted(sent.calls.items())})


def cpu_seconds() -> float:
    """User and system time of all threads of this process, those of the communication backend too."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def status_bytes(key: str) -> int:
    """A size from ``/proc/self/status``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def batches(steps: int, layout: Layout) -> DataLoader:
    """This rank's share of ``steps`` global batches of real text, which are the same under every layout."""
    text = torch.frombuffer(bytearray(split(4_000_000)[0]), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(text) - SEQUENCE, (steps * GLOBAL_BATCH,), generator=generator)
    windows = text[starts[:, None] + torch.arange(SEQUENCE + 1)].long()
    dataset = TensorDataset(windows[:, :-1], windows[:, 1:])
    # Tensor ranks are neighbours. The Trainer's own sampler would shuffle, and not for one process.
    index = int(os.environ.get("LOCAL_RANK", 0)) * layout.data // layout.ranks
    sampler = DistributedSampler(dataset, layout.data, index, shuffle=False)
    return DataLoader(dataset, batch_size=GLOBAL_BATCH // layout.data, sampler=sampler)


def run_rank(model: str, layout_name: str, warmup: int, steps: int, profile: Path | None = None) -> RankResult:
    """Train on this rank and measure."""
    layout, result = LAYOUTS[layout_name], RankResult()
    torch.set_num_threads(1)
    gc.collect()
    imports = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    L.seed_everything(0, verbose=False)
    strategy: Any = "auto" if layout.ranks == 1 else "ddp"
    if layout.ted is not None:
        strategy = TEDStrategy(**layout.ted, record_communication=True)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=layout.ranks,
        strategy=strategy,
        max_steps=warmup + steps,
        callbacks=[Meter(warmup, result)],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        profiler=torch_profiler(profile, warmup, steps) if profile is not None else None,
    )
    trainer.fit(Decoder(MODELS[model]), batches(warmup + steps, layout))
    result.peak = status_bytes("VmHWM") - imports
    if strategy == "ddp":
        sent = ddp_bytes(trainer)
        result.traffic = [{"all_reduce/data": sent}] * steps
    return result


def ddp_bytes(trainer: L.Trainer) -> int:
    """DDP has no recorder: it all-reduces every gradient once a step, ``2 n (g - 1) / g`` bytes by the ring's count."""
    assert trainer.model is not None
    size = sum(p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad)
    return 2 * size * (RANKS - 1) // RANKS


def torch_profiler(path: Path, warmup: int, steps: int) -> Any:
    from lightning.pytorch.profilers import PyTorchProfiler

    return PyTorchProfiler(
        dirpath=path.parent,
        filename=path.name,
        schedule=torch.profiler.schedule(wait=0, warmup=warmup, active=steps),
        sort_by_key="self_cpu_time_total",
        row_limit=60,
        export_to_chrome=False,
    )


# -- all ranks ----------------------------------------------------------------------------------------------------------


def run_layout(model: str, layout: str, warmup: int, steps: int) -> list[RankResult]:
    """Run a layout in fresh processes; the results of all ranks."""
    arguments = {"model": model, "layout": layout, "warmup": warmup, "steps": steps}
    return [
        RankResult(**found) for found in in_fresh_processes(measure_rank, arguments, LAYOUTS[layout].ranks, threads=1)
    ]


def measure_rank(model: str, layout: str, warmup: int, steps: int) -> dict[str, Any]:
    """:func:`run_rank`, as JSON can hold it."""
    return asdict(run_rank(model, layout, warmup, steps))


def merge(runs: list[list[RankResult]]) -> dict[str, Any]:
    """One cell of the table from several runs of it."""
    totals = [sum(parts) for ranks in runs for parts in zip(*(rank.cpu for rank in ranks), strict=True)]
    ranks = [rank for run in runs for rank in run]
    steps = [step for rank in ranks for step in rank.traffic]
    kinds = sorted({kind for step in steps for kind in step})
    counts = [step for rank in ranks for step in rank.calls]
    return {
        "cpu_seconds": median(totals),
        "cpu_seconds_of_steps": totals,
        # The mean: ranks of an expert group send different numbers of rows, and steps differ too.
        "bytes": {kind: sum(step.get(kind, 0) for step in steps) / len(steps) for kind in kinds},
        "bytes_of_busiest_rank": max((sum(step.values()) for step in steps), default=0),
        "calls": {kind: median(step.get(kind, 0) for step in counts) for kind in kinds if counts and kind in counts[0]},
        "peak_bytes_over_imports": median(max(rank.peak for rank in run) for run in runs),
        "first_loss": sum(rank.loss for rank in runs[0]) / len(runs[0]),
    }


def measure(models: list[str], layouts: list[str], warmup: int, steps: int, repeats: int) -> dict[str, Any]:
    """All cells. The layouts take turns, so that a busy minute on the machine does not fall on one of them alone."""
    table: dict[str, Any] = {}
    for model in models:
        runs: dict[str, list[list[RankResult]]] = {layout: [] for layout in layouts}
        for _ in range(repeats):
            for layout in layouts:
                print(f"running {model}: {LAYOUTS[layout].title} ...", file=sys.stderr, flush=True)
                runs[layout].append(run_layout(model, layout, warmup, steps))
        table[model] = {layout: merge(found) for layout, found in runs.items()}
        for layout, cell in table[model].items():
            cell["bytes_per_rank_and_step"] = sum(cell["bytes"].values())
            if "one" in table[model]:
                cell["cpu_ratio"] = cell["cpu_seconds"] / table[model]["one"]["cpu_seconds"]
            cell["meets_targets"] = verdict(cell, TARGETS.get((model, layout)))
    return table


def verdict(cell: dict[str, Any], target: Target | None) -> dict[str, bool]:
    """Which of a cell's bounds hold."""
    if target is None:
        return {}
    pairs = {
        "bytes": (cell["bytes_per_rank_and_step"] / 1e6, target.megabytes),
        "cpu": (cell.get("cpu_ratio"), target.cpu_ratio),
        "memory": (cell["peak_bytes_over_imports"] / 1e6, target.memory_megabytes),
    }
    return {name: got <= bound for name, (got, bound) in pairs.items() if got is not None and bound is not None}


def lines(table: dict[str, Any]) -> Iterator[str]:
    """The table as text."""
    for model, cells in table.items():
        yield f"\n{model}: {GLOBAL_BATCH} x {SEQUENCE} tokens a step"
        yield f"{'layout':38} {'MB sent':>9} {'CPU s':>7} {'ratio':>6} {'peak MB':>8}  targets"
        for layout, cell in cells.items():
            target = TARGETS.get((model, layout))
            bounds = [] if target is None else [target.megabytes, target.cpu_ratio, target.memory_megabytes]
            met = "" if target is None else ("met" if all(cell["meets_targets"].values()) else "NOT met")
            shown = " / ".join("-" if bound is None else f"{bound:g}" for bound in bounds)
            ratio = f"{cell['cpu_ratio']:.2f}" if "cpu_ratio" in cell else "-"
            yield (
                f"{LAYOUTS[layout].title:38} {cell['bytes_per_rank_and_step'] / 1e6:9.1f} {cell['cpu_seconds']:7.2f} "
                f"{ratio:>6} {cell['peak_bytes_over_imports'] / 1e6:8.0f}  {shown} {met}".rstrip()
            )
        yield "MB sent per rank and step, by kind and axis (calls):"
        for layout, cell in cells.items():
            if cell["bytes"]:
                calls = cell["calls"]
                parts = (
                    f"{kind} {sent / 1e6:.2f}" + (f" ({calls[kind]:.0f})" if kind in calls else "")
                    for kind, sent in cell["bytes"].items()
                )
                yield f"  {LAYOUTS[layout].title}: " + ", ".join(parts)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--warmup", type=int, default=3, help="steps that are not counted")
    parser.add_argument("--steps", type=int, default=8, help="steps that are measured, in each run")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each row")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file")
    parser.add_argument("--profile", type=Path, help="with --rank-of: file for torch's profile of this rank")
    parser.add_argument("--rank-of", nargs=2, metavar=("MODEL", "LAYOUT"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.rank_of is not None:
        warnings.filterwarnings("ignore", category=UserWarning)
        result = run_rank(*args.rank_of, args.warmup, args.steps, args.profile)
        Path(f"{args.out}{os.environ.get('LOCAL_RANK', 0)}.json").write_text(json.dumps(asdict(result)))
        return
    table = measure(args.models, args.layouts, args.warmup, args.steps, args.repeats)
    print("\n".join(lines(table)))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {"torch": torch.__version__, "lightning": L.__version__, "warmup": args.warmup, "steps": args.steps}
    settings |= {"repeats": args.repeats, "global_batch": GLOBAL_BATCH, "sequence": SEQUENCE, "cores": os.cpu_count()}
    args.out.write_text(json.dumps({"settings": settings, "results": table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
