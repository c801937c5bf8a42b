"""Checkpoint directories, written and read by all ranks together."""

from __future__ import annotations

import io
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from lightning_ted.checkpoint import directory
from lightning_ted.checkpoint.contents import EXTRA, MODEL, RANKS, STATE, TRAINING, Contents
from lightning_ted.checkpoint.directory import FileSum, Manifest
from lightning_ted.checkpoint.files import objects_in, read_file
from lightning_ted.checkpoint.portions import shared_out
from lightning_ted.checkpoint.reader import Tensors
from lightning_ted.checkpoint.storage import reason_of
from lightning_ted.checkpoint.writer import write_portions
from lightning_ted.errors import CheckpointError

log = logging.getLogger(__name__)
T = TypeVar("T")
Group = dist.ProcessGroup | None


def agreed(action: Callable[[], T], group: Group) -> T:
    """Do something on every rank of ``group``. A collective.

    Raises:
        CheckpointError: On every rank, if it fails on one of them.

    """
    result, failure, own = None, "", None
    try:
        result = action()
    except Exception as error:
        own, failure = error, str(error)
        if not isinstance(error, (CheckpointError, OSError)):
            failure = f"{type(error).__name__}: {error}"
    failures = everybodys(failure, group)
    try:
        for found in failures:
            if found:
                raise CheckpointError(found) from own
    finally:
        del own  # an exception that its own frame holds stays, with all that was to be written
    return result  # type: ignore[return-value]


def by_first(action: Callable[[], T], group: Group) -> T:
    """Do something on the first rank of ``group`` alone, and tell all others what it returns. A collective.

    Raises:
        CheckpointError: On every rank, if it fails.

    """
    outcome: list[Any] = [None]

    def act() -> None:
        outcome[0] = action()

    is_first = group is None or dist.get_rank(group) == 0
    agreed(act if is_first else lambda: None, group)
    if group is not None:
        dist.broadcast_object_list(outcome, group=group, group_src=0)
    return outcome[0]


def everybodys(value: T, group: Group) -> list[T]:
    """The values of all ranks of ``group``, by rank; plain data. A collective."""
    found = [value]
    if group is not None:
        found *= dist.get_world_size(group)
        dist.all_gather_object(found, value, group=group)
    return found


# -- writing ---------------------------------------------------------------------------------------------------------------


def write(contents: Contents, final: Path, group: Group) -> None:
    """Write a checkpoint directory. A collective over ``group``; None for this process alone.

    Raises:
        CheckpointError: On every rank, if it could not be written. What was there before is then as it was.

    """
    token = "" if group is None else by_first(lambda: uuid4().hex[:8], group)
    folder = directory.incomplete(final, token)
    try:
        by_first(lambda: directory.begin(final, token), group)
        sums: dict[str, FileSum] = {}
        for part, portions in contents.tensors.items():
            written = write_portions(folder / part, portions, group)
            sums.update({f"{part}/{name}": found for name, found in written.items()})
        everybodys = _gathered(sums, group)
        by_first(lambda: _finish(contents, folder, final, everybodys), group)
    except (CheckpointError, CheckpointException) as error:
        # Gone before anybody goes on.
        by_first(lambda: shutil.rmtree(folder, ignore_errors=True), group)
        raise _not_written(final, error) from error


def _not_written(final: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(f"'{final}' could not be written ({reason_of(error)}); nothing has been changed.")


def _finish(contents: Contents, folder: Path, final: Path, sums: dict[str, FileSum]) -> None:
    for name, data in contents.files().items():
        with (folder / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        sums[name] = len(data), zlib.crc32(data)
        tell_of_objects(final, data)
    manifest = Manifest(sums, contents.info)
    manifest.write(folder)
    try:
        manifest.check(folder, contents=False)
    except CheckpointError as error:
        raise CheckpointError(
            f"what a rank has written is not to be seen by the first one: {error} All nodes have to share the file system."
        ) from error
    directory.publish(folder, final)


def tell_of_objects(final: Path, data: bytes | Path) -> None:
    """Log it if what has been written to a checkpoint can be read only by those who trust it."""
    found = objects_in(data if isinstance(data, Path) else io.BytesIO(data))
    if found:
        log.warning(
            "The checkpoint '%s' holds more than plain data, so it can be read with `weights_only=False` only: %s",
            final,
            ", ".join(found),
        )


def _gathered(sums: dict[str, FileSum], group: Group) -> dict[str, FileSum]:
    """Those of all ranks, on the first one."""
    if group is None:
        return sums
    parts: list[Any] | None = [None] * dist.get_world_size(group) if dist.get_rank(group) == 0 else None
    dist.gather_object(sums, parts, group=group, group_dst=0)
    return {name: found for part in parts or [] for name, found in part.items()}


class Saver:
    """Writes checkpoints one after the other, if need be while training goes on.

    Args:
        group: A group of all ranks of its own, on which nobody else communicates.

    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self._pending: Future[None] | None = None
        #: In which the copies are made that are written in the background.
        self._room: Tensor | None = None

    def save(self, contents: Contents, final: Path, background: bool) -> None:
        """Write ``contents``. A collective.

        Args:
            contents: What to write; where it is written in the background, it is copied first.
            final: Where.
            background: Whether to return as soon as it has been copied to host memory.

        Raises:
            CheckpointError: If this or an earlier save fails.

        """
        self.wait()
        if not background:
            write(contents, final, self.group)
            return
        is_first = self.group is None or dist.get_rank(self.group) == 0

        def stage() -> tuple[Contents, Tensor | None]:
            try:
                if is_first:
                    final.parent.mkdir(parents=True, exist_ok=True)  # the caller may put a link to it there at once
            except OSError as error:
                raise _not_written(final, error) from error
            return contents.stage(self._room, is_first)

        staged, self._room = agreed(stage, self.group)
        self._pending = self._executor.submit(write, staged, final, self.group)
        self._pending.add_done_callback(_tell)

    @cached_property
    def _executor(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def wait(self) -> None:
        """Wait for what is being written.

        Raises:
            CheckpointError: If it fails.

        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def finish(self) -> None:
        """Wait for what is being written, and for what is being removed behind it.

        Raises:
            CheckpointError: If writing fails.

        """
        try:
            self.wait()
        finally:
            if "_executor" in self.__dict__:
                self._executor.submit(lambda: None).result()

    def settle(self) -> None:
        """Wait for what is being written, where another error is on its way; if it fails, that has been logged."""
        if self._pending is not None:
            wait([self._pending])
            self._pending = None

    def remove(self, path: Path) -> None:
        """Remove a checkpoint once what is being written is there; not at all if that fails. By one process alone."""
        if self._pending is None:
            directory.remove(path)
            return
        pending = self._pending

        def remove() -> None:
            if pending.exception() is None:
                directory.remove(path)

        self._executor.submit(remove).add_done_callback(_tell)


def _tell(done: Future[None]) -> None:
    error = done.exception()
    if error is not None:
        log.error("%s", error)


# -- reading ---------------------------------------------------------------------------------------------------------------


class Source:
    """A checkpoint directory that is read.

    Making one is a collective over ``group``; None for this process alone.

    Args:
        folder: The directory.
        group: Who reads.
        training: Whether more than the model is to be read.
        weights_only: False to allow plain data that are no plain data, and can execute code when they are read.

    Attributes:
        manifest: What it consists of.
        state: Plain data.

    Raises:
        CheckpointError: On every rank, if it is incomplete, damaged or something else.

    """

    def __init__(self, folder: Path, group: Group, training: bool = True, weights_only: bool = True) -> None:
        self.folder = directory.restored(folder)
        self.group = group
        self._reads_training = training
        self.manifest = agreed(lambda: Manifest.read(self.folder), group)
        agreed(self._check, group)
        self._weights_only = weights_only
        self.state: dict[str, Any] = self._plain(STATE)

    def _check(self) -> None:
        """Compare the files with the manifest: each by one rank."""
        self.manifest.check(self.folder, contents=False)
        sizes = {name: size for name, (size, _) in self.manifest.files.items()}
        if not self._reads_training:
            sizes = {name: size for name, size in sizes.items() if not name.startswith(f"{TRAINING}/")}
        world = 1 if self.group is None else dist.get_world_size(self.group)
        rank = 0 if self.group is None else dist.get_rank(self.group)
        self.manifest.check(self.folder, sorted(shared_out(sizes, range(world), rank)))

    def _plain(self, name: str) -> Any:
        return agreed(lambda: read_file(self.folder / name, self._weights_only), self.group)

    def _tensors(self, part: str) -> Tensors | None:
        if f"{part}/.metadata" not in self.manifest.files:
            return None
        return agreed(lambda: Tensors(self.folder / part), self.group)

    @cached_property
    def model(self) -> Tensors | None:
        """Tensors of the model; None if there are none."""
        return self._tensors(MODEL)

    @cached_property
    def extra(self) -> Tensors | None:
        """Tensors that callbacks keep; None if there are none."""
        return self._tensors(EXTRA)

    @cached_property
    def training(self) -> Tensors | None:
        """The optimizers' states; None if there are none, or they are not to be read."""
        return self._tensors(TRAINING) if self._reads_training else None

    @cached_property
    def ranks(self) -> Mapping[str, Any]:
        """Plain data of each rank that has written it."""
        return self._plain(RANKS)
