"""What one rank does in the benchmark of checkpoints: a decoder in training is saved, or a new one resumed; with a clock."""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from benchmarks.step import status_bytes
from examples.decoder.lightning_module import DecoderModule
from examples.decoder.model import DecoderConfig
from lightning_ted import TEDStrategy

RANKS = 4
SEQUENCE = 64
#: Seconds between two looks at the memory, and at whether a checkpoint is there.
INTERVAL = 0.002

SAVED_IN = {"tensor_parallel_size": 2, "expert_parallel_size": 2, "expert_tensor_parallel_size": 2}
OTHER_LAYOUT = {"tensor_parallel_size": 1, "expert_parallel_size": 4, "expert_tensor_parallel_size": 1}


@dataclass(frozen=True)
class Form:
    """A row of the table.

    Attributes:
        title: What the table calls it.
        ted: Arguments of ``TEDStrategy``; None for Lightning's strategy.
        is_directory: Whether it writes directories.
        reads: The form whose checkpoints it reads; None if it reads none.
        writes: Whether it writes.
        against: The form that it is compared with.

    """

    title: str
    ted: Mapping[str, Any] | None
    is_directory: bool
    reads: str | None
    writes: bool
    against: str | None = None

    def strategy(self) -> Strategy:
        """A new one."""
        if self.ted is None:
            return ModelParallelStrategy(RANKS, 1, save_distributed_checkpoint=self.is_directory)
        return TEDStrategy(**self.ted, save_distributed_checkpoint=self.is_directory)


THEIRS, THEIR_FILE = "lightning_directory", "lightning_file"
FORMS = {
    "directory": Form("TED, directory", SAVED_IN, True, "directory", True, THEIRS),
    "async": Form("TED, async_save", {**SAVED_IN, "async_save": True}, True, None, True, THEIRS),
    "directory_other": Form("TED, directory, other layout", OTHER_LAYOUT, True, "directory", False, THEIRS),
    THEIRS: Form("Lightning, directory", None, True, THEIRS, True),
    "file": Form("TED, one file", SAVED_IN, False, "file", True, THEIR_FILE),
    "file_other": Form("TED, one file, other layout", OTHER_LAYOUT, False, "file", False, THEIR_FILE),
    THEIR_FILE: Form("Lightning, one file", None, False, THEIR_FILE, True),
}


# -- training -----------------------------------------------------------------------------------------------------------


def config_of(shape: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that is trained."""
    return DecoderConfig.gpt(sequence_length=SEQUENCE, **shape)


class Decoder(DecoderModule):
    """The example's module, whose weights stay as they were made, so that all strategies have the same ones."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.0)


class ShardedDecoder(Decoder):
    """The same for Lightning's strategy: each block gathers its weights when it computes (FSDP2)."""

    def configure_model(self) -> None:
        assert self.device_mesh is not None
        mesh = self.device_mesh["data_parallel"]
        for block in self.decoder.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.decoder, mesh=mesh)


def start(form: Form, shape: Mapping[str, Any], callbacks: list[L.Callback], path: Path | None = None) -> Meter:
    """Train a new decoder for a step, or resume one that has been: then nothing is left to be done."""
    L.seed_everything(0, verbose=False)
    config = config_of(shape)
    module = Decoder(config) if form.ted is not None else ShardedDecoder(config)
    tokens = torch.randint(config.vocab_size, (SEQUENCE + 1,))  # the same on all ranks
    strategy = form.strategy()
    meter = Meter()
    meter.watch(strategy)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=strategy,
        max_steps=1,
        callbacks=callbacks,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader([(tokens[:-1], tokens[1:])]), ckpt_path=path)  # type: ignore[arg-type]
    return meter


# -- measuring ----------------------------------------------------------------------------------------------------------


@dataclass
class Meter:
    """Seconds, and bytes of memory at the peak above those before, of one action in one or several parts.

    Memory is what belongs to the process alone. Pages of files, which the system may drop, are not counted.
    """

    seconds: float = 0.0
    peak: int = 0
    kept: int = 0
    _highest: int = field(default=0, repr=False)

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Measure a part of the action."""
        before = self._highest = status_bytes("RssAnon")
        ended = threading.Event()
        sampler = threading.Thread(target=self._sample, args=(ended,))
        sampler.start()
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began
            after = status_bytes("RssAnon")
            ended.set()
            sampler.join()
            self.peak = max(self.peak, self.kept + max(self._highest, after) - before)
            self.kept += after - before

    def _sample(self, ended: threading.Event) -> None:
        while not ended.wait(INTERVAL):
            self._highest = max(self._highest, status_bytes("RssAnon"))

    def watch(self, strategy: Strategy) -> None:
        """Measure what a strategy does to load a checkpoint, wherever in its setting up the ``Trainer`` calls it."""
        for name in ("load_checkpoint", "load_model_state_dict", "load_optimizer_state_dict"):
            setattr(strategy, name, self._measured(getattr(strategy, name)))

    def _measured(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def measured(*args: Any, **kwargs: Any) -> Any:
            settle()
            with self.measure():
                return method(*args, **kwargs)

        return measured


def settle() -> None:
    """Let what was done before end, and give back what it has freed: the next measurement is not to pay for it, or to use it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    if dist.get_rank() == 0:
        os.sync()
    dist.barrier()


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def flush(path: Path) -> float:
    """Seconds until what the system still holds back of a checkpoint is on disk."""
    began = time.perf_counter()
    for file in files_of(path):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    return time.perf_counter() - began


def forget(path: Path) -> None:
    """Let the system read a checkpoint from disk the next time."""
    for file in files_of(path):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# -- saving -------------------------------------------------------------------------------------------------------------


class Saves(L.Callback):
    """Saves a checkpoint several times behind the first step; only the last one remains.

    Attributes:
        found: What was measured, one entry for each time.

    """

    def __init__(self, folder: Path, repeats: int) -> None:
        self.folder = folder
        self.repeats = repeats
        self.found: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        for index in range(self.repeats):
            path = self.folder / f"{index}.ckpt"
            self.found.append(measure_save(trainer.save_checkpoint, path))
            if trainer.is_global_zero and index + 1 < self.repeats:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def measure_save(save: Callable[[Path], Any], path: Path) -> dict[str, float]:
    """Write a checkpoint.

    Returns:
        Seconds until ``save`` has ``returned``, until it is ``visible`` and until it is ``stored`` on disk; bytes of memory at
        the ``peak``, and of ``files``.

    """
    settle()
    meter = Meter()
    with meter.measure():
        began = time.perf_counter()
        save(path)
        returned = time.perf_counter() - began
        while not path.exists():
            time.sleep(INTERVAL)
    flushed = flush(path) if dist.get_rank() == 0 else 0.0
    sizes = sum(file.stat().st_size for file in files_of(path))
    dist.barrier()
    found = {"returned": returned, "visible": meter.seconds, "stored": meter.seconds + flushed}
    return found | {"peak": meter.peak, "files": sizes}


def save_rank(form: str, shape: Mapping[str, Any], folder: str, repeats: int) -> list[dict[str, float]]:
    """Train a decoder, and save it under one form, on one of the ranks."""
    torch.set_num_threads(1)
    saves = Saves(Path(folder) / form, repeats)
    start(FORMS[form], shape, [saves])
    return saves.found


def write_rank(size: int, folder: str, repeats: int) -> list[dict[str, float]]:
    """Write as many bytes as a checkpoint has, each rank an equal part, and nothing more: what the disk costs."""
    dist.init_process_group("gloo")
    data = torch.randint(256, (size // RANKS,), dtype=torch.uint8).numpy().data

    def save(path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        with (path / str(dist.get_rank())).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        dist.barrier()

    found = []
    for index in range(repeats):
        path = Path(folder) / f"bytes{index}"
        found.append(measure_save(save, path))
        if dist.get_rank() == 0:
            shutil.rmtree(path)
    dist.destroy_process_group()
    return found


# -- loading ------------------------------------------------------------------------------------------------------------


def load_rank(form: str, shape: Mapping[str, Any], folder: str, repeats: int, cold: bool) -> list[dict[str, float]]:
    """Resume a new decoder several times, on one of the ranks.

    Returns:
        Each time ``seconds``, and bytes of memory at the ``peak``.

    """
    torch.set_num_threads(1)
    reads = FORMS[form].reads
    assert reads is not None
    (path,) = (Path(folder) / reads).iterdir()
    found = []
    for _ in range(repeats):
        if cold:
            forget(path)
        meter = start(FORMS[form], shape, [], path)
        found.append({"seconds": meter.seconds, "peak": meter.peak})
    return found


def weights_of(path: Path) -> dict[str, Tensor]:
    """The weights in a checkpoint of one file."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)["state_dict"]
