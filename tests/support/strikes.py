"""Kills a process of a training run at a chosen moment: at a call that a save consists of, at a hook, or after a time."""

from __future__ import annotations

import io
import os
import signal
import threading
from collections import Counter
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from lightning_ted.checkpoint import directory
from lightning_ted.checkpoint.contents import Contents
from lightning_ted.checkpoint.directory import Manifest

#: What changes something on disk, or waits for other ranks, while a checkpoint is written or removed.
_CALLS: dict[str, Any] = {
    "begin": directory,
    "publish": directory,
    "_exchange": directory,
    "remove": directory,
    "rename": os,
    "unlink": os,
    "rmdir": os,
    "mkdir": os,
    "fsync": os,
    "stage": Contents,
    "gather_object": dist,
    "all_gather_object": dist,
}
_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_train_epoch_end",
)


@dataclass(frozen=True)
class Strike:
    """When which rank is killed.

    Attributes:
        rank: Which one.
        event: At what; ``"time"``: after some of it.
        count: At the how manieth such event; how many milliseconds.

    """

    rank: int
    event: str
    count: int


class Watch(Callback):
    """Counts what happens in this process from the start of training on, and kills it when its moment has come.

    Only for a process that ends after the run: the functions that are watched are replaced for good.

    Args:
        strike: When to kill; None for never.

    """

    def __init__(self, strike: Strike | None) -> None:
        self.counts: Counter[str] = Counter()
        self._strike = strike
        self._trains = False
        for name in _HOOKS:
            setattr(self, name, self._hook(name))

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        for name, owner in _CALLS.items():
            self._watch(owner, name, name)
        self._watch(Manifest, "write", "manifest")
        save = torch.save
        # With options, it is an object on its way to another rank.
        torch.save = lambda data, file, **options: save(data, file if options else _Watched(file, self), **options)
        self._trains = True
        mine = self._strike is not None and self._strike.rank == trainer.global_rank
        if self._strike is not None and self._strike.event == "time" and mine:
            threading.Timer(self._strike.count / 1000, _die).start()
        if not mine:
            self._strike = None

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        if self._strike is not None:
            _die()  # the time was longer than the run

    def happens(self, event: str) -> None:
        """Note that something happens."""
        if self._trains:
            self.counts[event] += 1
            if self._strike is not None and (self._strike.event, self._strike.count) == (event, self.counts[event]):
                _die()

    def _watch(self, owner: Any, name: str, event: str) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.happens(f"before {event}")
            result = original(*args, **kwargs)
            self.happens(f"after {event}")
            return result

        setattr(owner, name, watched)

    def _hook(self, name: str) -> Any:
        return lambda *_: self.happens(name)


class _Watched(io.RawIOBase):
    """A file whose writing is watched."""

    def __init__(self, file: Any, watch: Watch) -> None:
        self._file, self._own_watch = file, watch

    def write(self, data: Any) -> int:
        self._own_watch.happens("before write")
        half = len(data) // 2
        self._file.write(data[:half])
        self._file.flush()
        self._own_watch.happens("within write")
        return half + self._file.write(data[half:])

    def flush(self) -> None:
        self._file.flush()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
