"""A disk that is full, that nobody may write to, or that fails: every rank is told where and why, and nothing is lost."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerStatus
from torch import nn

from lightning_ted.errors import CheckpointError
from tests.support.mortals import Mortals, answers, set_read_only
from tests.support.runs import Toy, assert_same_everywhere, loader, trainer, whole_weights

SIZE = 20 * 2**20
RANKS = 2
FORMS = ["directory", "background", "file"]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Mortals, Path]]:
    """Processes that have a small disk, and where they see it."""
    folder = tmp_path_factory.mktemp("disk")
    with Mortals(folder, SIZE) as group:
        try:
            group.start()
        except OSError as error:
            pytest.skip(f"this machine does not let one mount a file system: {error}")
        yield group, folder


class _Large(Toy):
    """With tensors of a megabyte, which are set aside on disk while a file of whole ones is made."""

    def __init__(self) -> None:
        super().__init__("sgd")
        self.net.up, self.net.down = nn.Linear(8, 2**15), nn.Linear(2**15, 8)


class _Saver:
    """Saves a run of one step, the first time to ``x.ckpt``, and goes on from there."""

    def __init__(self, form: str, folder: Path) -> None:
        self.form, self.path = form, folder / "x.ckpt"
        self.run = self._fit(1, None)
        assert not self.save()
        self.good = _contents(self.path)

    def _fit(self, epochs: int, path: Path | None) -> Any:
        layout = "tp2 file" if self.form == "file" else "tp2"
        run = trainer(layout, max_epochs=epochs, limit_train_batches=1)
        run.strategy._async_save = self.form == "background"
        run.fit(_Large(), loader(), ckpt_path=path)
        return run

    def save(self, path: Path | None = None) -> str:
        """Why it fails."""
        self.run.state.status = TrainerStatus.RUNNING  # else it is written at once
        try:
            self.run.save_checkpoint(path or self.path)
            self.run.strategy._saver_now().wait()
        except CheckpointError as error:
            return str(error)
        return ""

    def assert_intact(self, others: list[str]) -> None:
        """Beside what was written first there are only ``others``."""
        dist.barrier()
        assert sorted(os.listdir(self.path.parent)) == sorted([*others, "x.ckpt"])
        assert _contents(self.path) == self.good
        dist.barrier()

    def assert_goes_on(self) -> None:
        """What was written first is a state that a run goes on from as if nothing had happened."""
        assert_same_everywhere([whole_weights(self._fit(2, path)) for path in (self.path, None)])


def _contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {str(file): file.read_bytes() for file in files}


def _on_first(action: Callable[[], Any]) -> None:
    """Do something on rank 0, between what the others do before and after."""
    dist.barrier()
    if dist.get_rank() == 0:
        action()
    dist.barrier()


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


# -- full ------------------------------------------------------------------------------------------------------------------


def _free(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def _leave(folder: Path, free: int) -> None:
    with (folder / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, _free(folder) - free)


def _without_room(folder: Path, form: str) -> list[tuple[int, str, str]]:
    """What is told when there is no room for the first, a middle or the last file, over a checkpoint and beside it."""
    empty = _free(folder)
    saver, messages = _Saver(form, folder), []
    size = empty - _free(folder)
    for free in (0, 8192, size // 4, size // 2, size - 65536, size - 8192):
        for name in ("x.ckpt", "y.ckpt"):
            _on_first(lambda free=free: _leave(folder, free))
            before = _free(folder)
            messages.append((free, name, saver.save(folder / name)))
            saver.assert_intact(["filler"])
            assert _free(folder) == before, (free, name)
            _on_first((folder / "filler").unlink)
    saver.assert_goes_on()
    assert saver.save() == saver.save(folder / "y.ckpt") == ""
    _on_first(lambda: _clear(folder))
    return messages


@pytest.mark.parametrize("form", FORMS)
def test_a_full_disk_is_told_and_what_was_there_is_kept(disk: tuple[Mortals, Path], form: str) -> None:
    mortals, folder = disk
    for messages in answers(mortals.run(RANKS, _without_room, folder, form)):
        for free, name, message in messages:
            want = f"'{folder / name}' could not be written (", "No space left on device"
            assert all(text in message for text in want), (free, message)


# -- read-only -------------------------------------------------------------------------------------------------------------


def _without_permission(folder: Path, form: str) -> list[str]:
    saver = _Saver(form, folder)
    _on_first((folder / "file").touch)
    _on_first(lambda: set_read_only(folder, True))
    messages = [saver.save(), saver.save(folder / "y.ckpt"), saver.save(folder / "new" / "y.ckpt")]
    saver.assert_intact(["file"])
    saver.assert_goes_on()
    _on_first(lambda: set_read_only(folder, False))
    messages.append(saver.save(folder / "file" / "x.ckpt"))
    saver.assert_intact(["file"])
    assert saver.save() == ""
    _on_first(lambda: _clear(folder))
    return messages


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_that_cannot_be_written_to_is_told(disk: tuple[Mortals, Path], form: str) -> None:
    mortals, folder = disk
    for messages in answers(mortals.run(RANKS, _without_permission, folder, form)):
        for name, message in zip(("x.ckpt", "y.ckpt", "new/y.ckpt"), messages, strict=False):
            assert f"'{folder / name}' could not be written" in message and "Read-only file system" in message
        assert f"'{folder}/file/x.ckpt' could not be written" in messages[3] and f"'{folder}/file'" in messages[3]


# -- failing ---------------------------------------------------------------------------------------------------------------


def _with_an_error_on(rank: int, folder: Path, form: str) -> str:
    saver, sync = _Saver(form, folder), os.fsync

    def fails(file: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    if dist.get_rank() == rank:
        os.fsync = fails
    message = saver.save()
    os.fsync = sync
    saver.assert_intact([])
    saver.assert_goes_on()
    return message


@pytest.mark.parametrize(("form", "rank"), [("directory", 0), ("directory", 1), ("background", 1), ("file", 0)])
def test_an_error_of_one_ranks_disk_is_told_by_all(mortals: Mortals, tmp_path: Path, form: str, rank: int) -> None:
    for message in answers(mortals.run(RANKS, _with_an_error_on, rank, tmp_path, form)):
        assert f"'{tmp_path}/x.ckpt' could not be written (" in message and "Input/output error" in message
