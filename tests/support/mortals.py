"""Groups of processes that may die: forked anew for each call, by a process that has imported everything.

As in a user's run, rank 0 holds the store, and a process ends when its threads have ended; so what the others do when one is
killed is what they would do there::

    with Mortals() as mortals:
        ends = mortals.run(2, train, "/some/folder")
        assert [end.code for end in ends] == [-9, 1]
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tests.support.pool import HOST, PRELOAD, START_TIMEOUT, describe, forget, free_port, settle

#: Seconds beyond its own limit that the answer to a call may take.
_SLACK = 30.0


@dataclass(frozen=True)
class End:
    """How one rank ended.

    Attributes:
        code: Its exit code, the negative number of a signal; None if it hung and was ended.
        answer: What the function returned.
        error: The traceback of what it raised; where it hung.

    """

    code: int | None
    answer: Any
    error: str


def answers(ends: list[End]) -> list[Any]:
    """Those of all ranks.

    Raises:
        AssertionError: If one of them has failed.

    """
    for rank, end in enumerate(ends):
        assert end.code == 0, f"rank {rank} ended with {end.code}:\n{end.error}"
    return [end.answer for end in ends]


@dataclass(frozen=True)
class _Call:
    world_size: int
    timeout: float
    function: Callable[..., Any]
    args: tuple[Any, ...]


class Mortals:
    """Starts groups of processes, one group at a time.

    Args:
        disk: A folder that these processes are to see as a disk of its own; others see nothing of it.
        size: Its size in bytes.

    Raises:
        OSError: When the first group is started, if this machine does not let one have such a disk.

    """

    def __init__(self, disk: Path | None = None, size: int = 0) -> None:
        self._disk = disk, size
        self._process: ForkServerProcess | None = None
        self._pipe: Connection | None = None

    def __enter__(self) -> Mortals:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 60) -> list[End]:
        """Call ``fn(*args)`` on every rank of a new group and tell how each of them ended.

        Args:
            world_size: Number of ranks.
            fn: A function that can be imported by its module and name.
            args: Its arguments.
            timeout: Seconds after which those that are left are ended.

        """
        message = pickle.dumps(_Call(world_size, timeout, fn, args))
        pipe = self.start()
        try:
            pipe.send_bytes(message)
            return self._answer(pipe, timeout + _SLACK)
        except BaseException:
            self.close()
            raise

    def start(self) -> Connection:
        """Start the process that will fork, unless it runs."""
        if self._pipe is not None:
            return self._pipe
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, *self._disk), daemon=False)
        atexit.register(self.close)
        try:
            self._process.start()
            there.close()
            self._answer(self._pipe, START_TIMEOUT)
        except BaseException:
            self.close()
            raise
        return self._pipe

    @staticmethod
    def _answer(pipe: Connection, timeout: float) -> Any:
        if not pipe.poll(timeout):
            raise TimeoutError(f"no answer within {timeout:g} s")
        answer = pickle.loads(pipe.recv_bytes())
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def close(self) -> None:
        """End the process that forks."""
        atexit.unregister(self.close)
        if self._process is not None and self._process.pid is not None:
            self._process.kill()
            self._process.join()
            self._process.close()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None


# ---------------------------------------------------------------------------------------------------------------------
# In the process that forks
# ---------------------------------------------------------------------------------------------------------------------


def _serve(pipe: Connection, disk: Path | None, size: int) -> None:
    settle()
    try:
        if disk is not None:
            _mount(disk, size)
        answer: Any = None
    except OSError as error:
        answer = error
    pipe.send_bytes(pickle.dumps(answer))
    while True:
        try:
            message = pipe.recv_bytes()
        except (EOFError, ConnectionError):
            return
        pipe.send_bytes(pickle.dumps(_run(pickle.loads(message))))


def _run(call: _Call) -> list[End]:
    """Fork a group and wait for its end."""
    folder, port = Path(tempfile.mkdtemp(prefix="mortals-")), free_port()
    deadline = time.monotonic() + call.timeout
    ranks = [multiprocessing.Process(target=_be, args=(rank, port, folder, call)) for rank in range(call.world_size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(max(0.0, deadline - time.monotonic()))
    hung = [rank for rank in ranks if rank.is_alive()]
    for rank in hung:
        os.kill(rank.pid or 0, signal.SIGUSR2)
    if hung:
        time.sleep(0.5)  # for their stacks
    ends = []
    for number, rank in enumerate(ranks):
        rank.kill()
        rank.join()
        answer, error = _left_by(folder, number)
        ends.append(End(None if rank in hung else rank.exitcode, answer, error))
    shutil.rmtree(folder)
    return ends


def _left_by(folder: Path, rank: int) -> tuple[Any, str]:
    answer = folder / f"{rank}"
    if answer.exists():
        return pickle.loads(answer.read_bytes())
    stack = folder / f"{rank}.stack"
    return None, stack.read_text() if stack.exists() else ""


def _be(rank: int, port: int, folder: Path, call: _Call) -> None:
    """One rank's life. It ends as programs do: with its threads waited for."""
    import torch.distributed as dist

    stacks = (folder / f"{rank}.stack").open("w")
    faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        NODE_RANK="0",
        WORLD_SIZE=str(call.world_size),
        MASTER_ADDR=HOST,
        MASTER_PORT=str(port),
    )
    forget(rank)
    answer: tuple[Any, str]
    try:
        # Longer than anybody waits: whoever hangs is found hanging.
        dist.init_process_group("gloo", timeout=timedelta(seconds=call.timeout + 10))
        answer = call.function(*call.args), ""
    except BaseException as error:  # pytest's outcomes and SystemExit too
        answer = None, describe(error)
    (folder / f"{rank}.part").write_bytes(pickle.dumps(answer))
    (folder / f"{rank}.part").rename(folder / f"{rank}")
    if answer[1]:
        sys.exit(1)
    dist.barrier()  # whoever is first would close connections that others still use


# -- a disk of one's own ----------------------------------------------------------------------------------------------------

_NEW_USER, _NEW_MOUNTS = 0x10000000, 0x00020000
_READ_ONLY, _REMOUNT, _RECURSIVE, _PRIVATE = 1, 32, 16384, 1 << 18


def _mount(folder: Path, size: int) -> None:
    """Let a folder be a disk for this process and its children. It goes with them."""
    user, group = os.getuid(), os.getgid()
    try:
        _system("unshare", ctypes.c_int(_NEW_MOUNTS))
    except PermissionError:
        _system("unshare", ctypes.c_int(_NEW_MOUNTS | _NEW_USER))
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _system("mount", b"none", b"/", None, ctypes.c_ulong(_RECURSIVE | _PRIVATE), None)
    _system("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", ctypes.c_ulong(0), f"size={size}".encode())


def set_read_only(folder: Path, read_only: bool) -> None:
    """Let nobody write to the disk ``folder``, or let them again. By a rank that has it."""
    flags = _REMOUNT | (_READ_ONLY if read_only else 0)
    _system("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", ctypes.c_ulong(flags), None)


def _system(name: str, *args: Any) -> None:
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is None:
        raise OSError(f"this system has no {name}")
    if function(*args) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
