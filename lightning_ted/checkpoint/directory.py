"""A checkpoint directory: complete or not there at all.

It is written under a hidden name beside its place, with a manifest of every file's length and checksum, and then renamed; what was
there before is removed after that. So a process that is killed at any moment leaves the old one, the new one, or both.

Note [Hidden names]
A hidden name says what it stands for, and is of this package alone, as others keep hidden files, too. It does not contain the name
that it hides: whoever looks for a name that contains ``hpc_ckpt_`` does not find what has not been completed. What is being written
has a new name each time: a client of a network file system may for a while take a name for what was renamed since.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import json
import os
import re
import shutil
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from lightning_ted.checkpoint.writer import FileSum
from lightning_ted.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT, VERSION = "lightning-ted", 1

#: Endings of hidden names of what is being written, has been replaced or is being removed.
_INCOMPLETE, _REPLACED, _REMOVED = "ted_incomplete", "ted_replaced", "ted_removed"
#: What there may be in a directory that may be replaced: a checkpoint of this package, damaged or not, with at least two of its
#: files; one in torch's distributed format; safetensors.
_OWN = {MANIFEST, "state.pt", "ranks.pt", "model", "training", "extra"}
_OTHERS = (
    re.compile(r"\.metadata|__\d+_\d+\.distcp|meta\.pt"),
    re.compile(r"model.*\.safetensors(\.index\.json)?|(generation_)?config\.json"),
    re.compile(r"adapter_(config\.json|model\.safetensors)|README\.md"),
)
#: By what files begin that may be replaced: archives, as torch writes them, and pickles, as it once did. Or by their names.
_BEGINNINGS, _SUFFIXES = (b"PK", b"\x80"), {".ckpt", ".pt", ".pth", ".safetensors"}
#: After so many seconds without a change, what is incomplete belongs to a run that has been killed.
_ABANDONED = 3600
_BLOCK = 2**22


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint directory consists of.

    Attributes:
        files: Length in bytes and CRC-32 of each file, by its path in the directory.
        info: What is known of the checkpoint without reading it: step, epoch, layout, sizes.

    """

    files: Mapping[str, FileSum]
    info: Mapping[str, Any]

    def write(self, folder: Path) -> None:
        """Write it into a directory, to disk."""
        body = {"format": FORMAT, "version": VERSION, "info": self.info, "files": self.files}
        text = json.dumps({**body, "checksum": _checksum(body)}, indent=1)
        with (folder / MANIFEST).open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a directory.

        Raises:
            CheckpointError: If there is none, it is damaged, or of a later version.

        """
        path = folder / MANIFEST
        try:
            body = json.loads(path.read_bytes())
            checksum = body.pop("checksum")
            files = {str(name): (int(size), int(crc)) for name, (size, crc) in body["files"].items()}
            outside = any(Path(name).is_absolute() or ".." in Path(name).parts for name in files)
            is_known = body["format"] == FORMAT and "state.pt" in files and isinstance(body["info"], dict)
            version = int(body["version"])
        except FileNotFoundError as error:
            hint = "It was written by something else, or is a part of a checkpoint."
            if folder.is_dir() and not any(folder.iterdir()):
                hint = "The directory is empty."
            raise CheckpointError(
                f"'{folder}' is no checkpoint of this package: it holds no {MANIFEST}. {hint}"
            ) from error
        except Exception as error:  # whatever is in it
            raise CheckpointError(
                f"'{path}' is damaged or something else ({error}); use an older checkpoint."
            ) from error
        if not is_known or outside or checksum != _checksum(body):
            raise CheckpointError(f"'{path}' is damaged or something else; use an older checkpoint.")
        if version > VERSION:
            raise CheckpointError(f"'{folder}' is of version {version} of the format, this package knows {VERSION}.")
        return cls(files, body["info"])

    def check(self, folder: Path, names: Iterable[str] | None = None, contents: bool = True) -> None:
        """Compare files with the manifest.

        Args:
            folder: The directory.
            names: Which files; None for all.
            contents: Whether to read them, or to look at their lengths only.

        Raises:
            CheckpointError: Naming the first file that is missing or differs.

        """
        for name in self.files if names is None else names:
            size, crc = self.files[name]
            path = folder / name
            try:
                found = path.stat().st_size
                if found != size:
                    raise CheckpointError(f"'{path}' has {found} bytes instead of {size}; use an older checkpoint.")
                if contents and _crc(path) != crc:
                    raise CheckpointError(f"'{path}' is damaged: its checksum is wrong. Use an older checkpoint.")
            except OSError as error:
                raise CheckpointError(
                    f"'{path}' cannot be read ({error.strerror}); use an older checkpoint."
                ) from error


def _checksum(body: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            crc = zlib.crc32(block, crc)
    return crc


# -- beginning, publishing and removing ------------------------------------------------------------------------------------


def begin(final: Path, token: str = "") -> Path:
    """An empty directory to write the checkpoint ``final`` in, on the same file system.

    Raises:
        CheckpointError: If there is something that is no checkpoint.
        OSError: If it cannot be made.

    """
    folder = prepare(final, token)
    folder.mkdir()
    return folder


def prepare(final: Path, token: str = "") -> Path:
    """Where to write the checkpoint ``final``, on the same file system. Nothing is there; what killed runs have left is removed.

    Raises:
        CheckpointError: If there is a directory of something else in its place, which would be removed.
        OSError: If there cannot be anything.

    """
    final.parent.mkdir(parents=True, exist_ok=True)
    require_replaceable(final)
    _clear(final.parent)
    for left in final.parent.glob(f"{glob.escape(_hidden_stem(final))}.*{_INCOMPLETE}"):
        _remove(left)
    return incomplete(final, token)


def require_replaceable(path: Path) -> None:
    """See that nothing gets lost if what is at a path is replaced.

    Raises:
        CheckpointError: If there is a directory of something else than a checkpoint, or a device or the like.

    """
    if path.is_dir():
        there = {inner.name for inner in path.iterdir()}
        is_own = there <= _OWN and len(there) > 1
        if there and not is_own and not any(all(map(known.fullmatch, there)) for known in _OTHERS):
            raise CheckpointError(
                f"'{path}' is a directory of something else, or holds something else as well, which is not removed; choose "
                "another path"
            )
    elif path.is_file():
        with path.open("rb") as file:
            begins = file.read(2)
        if begins and path.suffix not in _SUFFIXES and not begins.startswith(_BEGINNINGS):
            raise CheckpointError(f"'{path}' is a file of something else, which is not replaced; choose another path")
    elif path.exists():
        raise CheckpointError(f"'{path}' is neither a file nor a directory; choose another path")


def incomplete(final: Path, token: str = "") -> Path:
    """Where :func:`prepare` lets a checkpoint be written."""
    return _hidden(final, f"{token}.{_INCOMPLETE}" if token else _INCOMPLETE)


def publish(written: Path, final: Path) -> None:
    """Let what was written take its place, and remove what was there.

    Raises:
        OSError: If it cannot be renamed; everything is then as it was.

    """
    for folder, _, _ in os.walk(written):
        _sync_directory(Path(folder))
    if not os.path.lexists(final) or not (written.is_dir() or final.is_dir()):
        os.replace(written, final)
        _try_to_sync(final.parent)
        return
    old = written
    if not _exchange(written, final):
        old = _hidden(final, _REPLACED)
        _remove(old)
        os.rename(final, old)
        try:
            os.rename(written, final)
        except OSError:
            os.rename(old, final)
            raise
    _try_to_sync(final.parent)
    _remove(old)


def remove(path: Path) -> None:
    """Remove a checkpoint: at once from sight, then from disk."""
    if not os.path.lexists(path):
        return
    hidden = _hidden(path, _REMOVED)
    _remove(hidden)
    os.rename(path, hidden)
    _remove(hidden)


def restored(path: Path) -> Path:
    """``path``, or what it was replaced by when the process was killed."""
    old = _hidden(path, _REPLACED)
    return old if old.exists() and not os.path.lexists(path) else path


def recover(folder: Path) -> None:
    """Let be seen again what was being replaced when a process was killed, and let links lead to the newest checkpoint that led to
    one that was never completed; for those who look at what there is in a folder.
    """
    for old in folder.glob(f".*.{_REPLACED}"):
        if not os.path.lexists(_shown(old)):
            with suppress(OSError):  # another rank has, or nobody may; `restored` finds it there
                os.rename(old, _shown(old))
    for link in folder.iterdir() if folder.is_dir() else ():
        newest = next(checkpoints_in(folder), None) if link.is_symlink() and not link.exists() else None
        if newest is not None:
            with suppress(OSError):
                again = _hidden(link, _REPLACED)
                _remove(again)
                again.symlink_to(newest.name)
                os.replace(again, link)


def _hidden(path: Path, kind: str) -> Path:
    return path.with_name(f"{_hidden_stem(path)}.{kind}")


def _hidden_stem(path: Path) -> str:
    return "." + path.name.replace("%", "%25").replace("_", "%5F")


def _shown(hidden: Path) -> Path:
    return hidden.with_name(unquote(hidden.stem[1:]))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _clear(parent: Path) -> None:
    """Remove what killed runs have left behind."""
    for path in parent.glob(f".*.{_REMOVED}"):
        _remove(path)
    for path in parent.glob(f".*.{_REPLACED}"):
        if os.path.lexists(_shown(path)):
            _remove(path)
    for path in parent.glob(f".*.{_INCOMPLETE}"):
        if time.time() - _last_change(path) > _ABANDONED:
            _remove(path)


def _last_change(folder: Path) -> float:
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
    except OSError:
        return time.time()


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths in one instant, where the system can."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        return False
    here, exchange = -100, 2
    if renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _try_to_sync(folder: Path) -> None:
    """What has been renamed is to be seen already; so there is nothing to tell of but that a failing machine may forget it."""
    with suppress(OSError):
        _sync_directory(folder)


def _sync_directory(folder: Path) -> None:
    if os.name == "nt":
        return  # which cannot open one
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # what some file systems say of directories
            raise
    finally:
        os.close(handle)


# -- what there is ---------------------------------------------------------------------------------------------------------


def checkpoints_in(folder: Path) -> Iterator[Path]:
    """What look like checkpoints in a folder, the newest first."""
    try:
        found = [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError:
        return
    found = [path for path in found if (path / MANIFEST).exists() or (path.is_file() and path.suffix == ".ckpt")]
    yield from sorted(found, key=_time_of, reverse=True)


def _time_of(path: Path) -> float:
    """When a checkpoint was written: the time of a copy is that of the copying."""
    with suppress(CheckpointError, KeyError, TypeError, ValueError):
        return float(Manifest.read(path).info["time"])
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0
