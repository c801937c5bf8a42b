"""Bars that tell how far a command has come, on a terminal only."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from typing_extensions import Self

#: Seconds between two looks at what has been written.
_INTERVAL = 0.2


class Bars:
    """One bar for each step, on standard error; nothing if that is no terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    @contextmanager
    def step(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar of ``total`` bytes; gives what advances it by some."""
        task = self._progress.add_task(what, total=total)
        yield lambda size: self._progress.advance(task, size)
        self._progress.update(task, completed=total)

    @contextmanager
    def watching(self, what: str, path: Path, total: int) -> Iterator[None]:
        """A bar of what has been written of ``total`` bytes to a file, or to the files of a directory."""
        if self._progress.disable:
            yield
            return
        task, done = self._progress.add_task(what, total=total), threading.Event()

        def watch() -> None:
            while not done.wait(_INTERVAL):
                self._progress.update(task, completed=min(size_of(path), total))

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        self._progress.update(task, completed=total)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a directory."""
    files = path.rglob("*") if path.is_dir() else (path,)
    try:
        return sum(file.stat().st_size for file in files if file.is_file())
    except OSError:
        return 0  # being renamed
