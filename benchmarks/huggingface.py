"""A model of Hugging Face under this package's strategy, and under the library's own tensor x expert x FSDP2 parallelism.

``python -m benchmarks.huggingface`` trains the same small Qwen3-MoE on the same text from the same weights, each layout in fresh
processes, prints a table and writes ``benchmarks/results/huggingface.json``. See ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.collectives import CollectiveBytes
from benchmarks.fresh import in_fresh_processes
from benchmarks.step import GLOBAL_BATCH, RANKS, SEQUENCE, cpu_seconds, status_bytes
from examples.decoder.text import split
from lightning_ted import TEDStrategy, from_pretrained

RESULTS = Path(__file__).parent / "results" / "huggingface.json"
MODEL: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 256,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "max_position_embeddings": SEQUENCE,
}


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism on four processes.

    Attributes:
        tensor: Tensor-parallel degree; the data-parallel (and FSDP) degree follows from it.
        expert: Expert-parallel degree.
        expert_tensor: Expert-tensor degree. The library has none.

    """

    tensor: int
    expert: int
    expert_tensor: int = 1

    def __str__(self) -> str:
        return f"tensor {self.tensor} x expert {self.expert}" + (
            f" x expert-tensor {self.expert_tensor}" if self.expert_tensor > 1 else ""
        )


BOTH = [Layout(2, 4), Layout(2, 2), Layout(1, 4), Layout(1, 2)]
OURS_ALONE = [Layout(2, 2, 2)]


@dataclass
class RankResult:
    """What one rank measured; lists have one entry for each measured step.

    Attributes:
        cpu: CPU seconds of all threads.
        sent: Bytes by kind.
        losses: Of every step.
        peak: Highest resident memory in bytes, less that after the imports.

    """

    cpu: list[float] = field(default_factory=list)
    sent: list[dict[str, int]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak: int = 0


# -- one rank -----------------------------------------------------------------------------------------------------------


def share(steps: int, data: int, rank: int) -> list[Tensor]:
    """This data rank's share of each of ``steps`` global batches of text."""
    text = torch.frombuffer(bytearray(split(4_000_000)[0]), dtype=torch.uint8)
    starts = torch.randint(len(text) - SEQUENCE, (steps, GLOBAL_BATCH), generator=torch.Generator().manual_seed(0))
    return [text[at[:, None] + torch.arange(SEQUENCE)].long().chunk(data)[rank] for at in starts]


class Language(L.LightningModule):
    """What a user writes."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder
        self.model: Any = None

    def configure_model(self) -> None:
        from transformers import AutoModelForCausalLM

        if self.model is None:
            self.model = from_pretrained(AutoModelForCausalLM, self.folder)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch, use_cache=False).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)


class Meter:
    """Measures steps, after some that are not counted."""

    def __init__(self, warmup: int, result: RankResult) -> None:
        self._warmup, self._result, self._step = warmup, result, 0
        self._counter: CollectiveBytes | None = None
        self._start = 0.0

    def begin(self) -> None:
        """A step begins."""
        self._counter = CollectiveBytes()
        self._counter.__enter__()
        self._start = cpu_seconds()

    def end(self, loss: float) -> None:
        """A step, of this loss, has ended."""
        spent = cpu_seconds() - self._start
        assert self._counter is not None
        self._counter.__exit__(None, None, None)
        self._result.losses.append(loss)
        if self._step >= self._warmup:
            self._result.cpu.append(spent)
            self._result.sent.append(dict(self._counter.sent))
        self._step += 1


class Measure(L.Callback):
    """Hands a Trainer's steps to a meter."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def on_train_batch_start(self, *_: Any) -> None:
        self._meter.begin()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self._meter.end(float(outputs["loss"]))


def run_ours(folder: str, layout: Layout, batches: list[Tensor], meter: Meter) -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=TEDStrategy(
            tensor_parallel_size=layout.tensor,
            expert_parallel_size=layout.expert,
            expert_tensor_parallel_size=layout.expert_tensor,
        ),
        max_steps=len(batches),
        callbacks=[Measure(meter)],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Language(folder), DataLoader(batches, batch_size=None))  # type: ignore[arg-type]


def run_native(folder: str, layout: Layout, batches: list[Tensor], meter: Meter) -> None:
    """The library alone: no Trainer around it."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(
        tp_size=layout.tensor,
        fsdp_size=RANKS // layout.tensor,
        ep_size=layout.expert,
        ep_implementation="all_to_all",
    )
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config).train()
    # Its parameters lie on several meshes, which the fused and foreach kernels do not take together.
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        groups.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    optimizers = [torch.optim.AdamW(parameters, lr=1e-3, fused=True) for parameters in groups.values()]
    for batch in batches:
        meter.begin()
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        meter.end(float(loss))


def run_rank(folder: str, ours: bool, layout: dict[str, int], warmup: int, steps: int) -> dict[str, Any]:
    """Train on this rank and measure; as JSON can hold it."""
    import transformers  # noqa: F401  (among the imports, whose memory is not counted)

    at, result = Layout(**layout), RankResult()
    torch.set_num_threads(1)
    gc.collect()
    imports = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    rank = int(os.environ["RANK"])
    batches = share(warmup + steps, RANKS // at.tensor, rank // at.tensor)
    (run_ours if ours else run_native)(folder, at, batches, Meter(warmup, result))
    result.peak = status_bytes("VmHWM") - imports
    if dist.is_initialized():
        dist.destroy_process_group()
    return asdict(result)


# -- all ranks ----------------------------------------------------------------------------------------------------------


def merge(runs: list[list[RankResult]]) -> dict[str, Any]:
    """One row of the table from several runs of it."""
    ranks = [rank for run in runs for rank in run]
    steps = [step for rank in ranks for step in rank.sent]
    kinds = sorted({kind for step in steps for kind in step})
    return {
        "bytes": {kind: sum(step.get(kind, 0) for step in steps) / len(steps) for kind in kinds},
        "bytes_per_rank_and_step": sum(sum(step.values()) for step in steps) / len(steps),
        "cpu_seconds": median(sum(parts) for run in runs for parts in zip(*(rank.cpu for rank in run), strict=True)),
        "peak_bytes_over_imports": median(max(rank.peak for rank in run) for run in runs),
        "losses": [sum(parts) / len(parts) for parts in zip(*(rank.losses for rank in runs[0]), strict=True)],
    }


def measure(folder: str, warmup: int, steps: int, repeats: int) -> list[dict[str, Any]]:
    """All rows, which take turns."""
    rows = [(ours, layout) for layout in BOTH for ours in (True, False)] + [(True, layout) for layout in OURS_ALONE]
    runs: list[list[list[RankResult]]] = [[] for _ in rows]
    for _ in range(repeats):
        for found, (ours, layout) in zip(runs, rows, strict=True):
            print(f"running {'ted' if ours else 'native'}: {layout} ...", file=sys.stderr, flush=True)
            arguments = {"folder": folder, "ours": ours, "layout": asdict(layout), "warmup": warmup, "steps": steps}
            found.append([RankResult(**one) for one in in_fresh_processes(run_rank, arguments, RANKS, threads=1)])
    return [
        {"layout": str(layout), "by": "ted" if ours else "native", **merge(found)}
        for found, (ours, layout) in zip(runs, rows, strict=True)
    ]


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """The table as text; below each pair, this package's figures over the library's."""
    title = f"{'layout':42} {'by':8} {'MB sent':>8} {'CPU s':>7} {'peak MB':>8} {'first loss':>11} {'last':>8}"
    text = [f"qwen3_moe: {GLOBAL_BATCH} x {SEQUENCE} tokens a step on {RANKS} processes", title]
    for row in rows:
        text.append(
            f"{row['layout']:42} {row['by']:8} {row['bytes_per_rank_and_step'] / 1e6:8.1f} {row['cpu_seconds']:7.2f} "
            f"{row['peak_bytes_over_imports'] / 1e6:8.0f} {row['losses'][0]:11.6f} {row['losses'][-1]:8.4f}"
        )
        if row["by"] == "native":
            ours = next(other for other in rows if other["layout"] == row["layout"] and other["by"] == "ted")
            ratios = [
                ours[key] / row[key] for key in ("bytes_per_rank_and_step", "cpu_seconds", "peak_bytes_over_imports")
            ]
            text.append(f"{'':42} {'ratio':8} {ratios[0]:8.2f} {ratios[1]:7.2f} {ratios[2]:8.2f}")
    text.append("MB sent per rank and step, by kind:")
    for row in rows:
        parts = ", ".join(f"{kind} {sent / 1e6:.2f}" for kind, sent in row["bytes"].items())
        text.append(f"  {row['layout']}, {row['by']}: {parts}")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not counted")
    parser.add_argument("--steps", type=int, default=6, help="steps that are measured, in each run")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each row")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file")
    args = parser.parse_args()
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(transformers.Qwen3MoeConfig(**MODEL)).save_pretrained(folder)
        rows = measure(folder, args.warmup, args.steps, args.repeats)
    print("\n".join(lines(rows)))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "command": shlex.join(["python", "-m", "benchmarks.huggingface", *sys.argv[1:]]),
        "date": str(date.today()),
    }
    about |= {"torch": torch.__version__, "transformers": transformers.__version__, "cores": str(os.cpu_count())}
    args.out.write_text(json.dumps({"about": about, "model": MODEL, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
