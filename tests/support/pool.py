"""A pool of worker processes that stay alive between tests, joined into a new gloo process group for every call.

Starting a process that has torch and Lightning costs seconds; a call of a warm pool costs tens of milliseconds::

    def add_up(x):  # a module-level function: it travels by name, its arguments and result by pickle
        tensor = torch.tensor(x)
        dist.all_reduce(tensor)
        return tensor.item()


    with Pool(4) as pool:
        assert pool.run(add_up, 1.0) == [4.0] * 4

In pytest, use the ``pools`` fixture: ``pools(4).run(add_up, 1.0)``. The workers' environment makes Lightning believe that
a launcher started them, so that ``Trainer(devices=4)`` neither starts processes nor initialises the process group again.
A call that fails or hangs ends its pool's workers; the next call starts new ones.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import multiprocessing
import multiprocessing.connection
import os
import pickle
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

#: Imported once by the fork server, and shared by every worker of every pool.
PRELOAD = ["torch", "torch.distributed.tensor", "torch.distributed.checkpoint", "lightning.pytorch", "lightning_ted"]

#: Seconds that a pool may take to start, on a loaded machine.
START_TIMEOUT = 180.0
#: Seconds that the other ranks get to report, once one rank has failed: a peer may wait for it forever.
GRACE = 1.0

_FOREIGN_LAUNCHERS = ("SLURM_", "TORCHELASTIC_", "OMPI_", "LSB_", "JSM_", "PL_")
HOST = "127.0.0.1"


class WorkerError(RuntimeError):
    """A function raised, or a worker died, on at least one rank; the text lists the ranks with their tracebacks."""


class PoolTimeoutError(WorkerError):
    """Some ranks did not finish in time; the text says where each of them stood."""


@dataclass(frozen=True)
class _Call:
    number: int
    main_port: int
    timeout: float
    function: Callable[..., Any]
    args: tuple[Any, ...]


class Pool:
    """Worker processes on this machine, one for each rank of a gloo world.

    Args:
        world_size: Number of workers. They start with the first call.

    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[ForkServerProcess] = []
        self._pipes: list[Connection] = []
        self._store: Any = None
        self._folder: Path | None = None
        self._calls = 0

    def __enter__(self) -> Pool:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
        """Call ``fn(*args)`` on every rank and return the results, by rank.

        Args:
            fn: A function that the workers can import by its module and name.
            args: Its arguments; each rank gets its own copy.
            timeout: Seconds that the call may take, without the start of the workers.

        Raises:
            WorkerError: If a rank raised or died.
            PoolTimeoutError: If a rank did not finish in time.

        """
        self._calls += 1
        try:
            message = pickle.dumps(_Call(self._calls, free_port(), timeout, fn, args))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise TypeError(
                f"{fn!r} or its arguments cannot be sent to the workers ({error}); use a module-level function."
            ) from error
        self.start()
        try:
            for pipe in self._pipes:
                pipe.send_bytes(message)
            return self._collect(time.monotonic() + timeout, f"{fn.__module__}.{fn.__qualname__}", timeout)
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Start the workers, unless they run."""
        if self._processes and all(process.is_alive() for process in self._processes):
            return
        self.close()
        from torch.distributed import TCPStore

        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._folder = Path(tempfile.mkdtemp(prefix="pool-"))
        self._store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        # Registered after multiprocessing's own exit handler and so run before it; that one would wait for the workers.
        atexit.register(self.close)
        try:
            for rank in range(self.world_size):
                here, there = context.Pipe()
                # Not daemonic: a daemonic process may not have children, and data loaders want some.
                process = context.Process(
                    target=_serve,
                    args=(rank, self.world_size, there, self._store.port, self._stack_file(rank)),
                    name=f"rank {rank} of {self.world_size}",
                    daemon=False,
                )
                process.start()
                there.close()
                self._processes.append(process)
                self._pipes.append(here)
            self._collect(time.monotonic() + START_TIMEOUT, "the start of the workers", START_TIMEOUT)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the workers; the next call starts new ones."""
        atexit.unregister(self.close)
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
            process.close()
        for pipe in self._pipes:
            pipe.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._processes, self._pipes, self._store, self._folder = [], [], None, None

    def _collect(self, deadline: float, what: str, timeout: float) -> list[Any]:
        """One answer from each worker."""
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting = dict(enumerate(self._pipes))
        while waiting:
            ready = multiprocessing.connection.wait(waiting.values(), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
                try:
                    succeeded, answer = pickle.loads(waiting.pop(rank).recv_bytes())
                except (EOFError, ConnectionError):
                    self._processes[rank].join()
                    succeeded, answer = False, f"the worker died with exit code {self._processes[rank].exitcode}\n"
                (results if succeeded else failures)[rank] = answer
            if failures:
                deadline = min(deadline, time.monotonic() + GRACE)
        if failures:
            raise WorkerError(_report(f"{what} failed", failures, list(waiting)))
        if waiting:
            raise PoolTimeoutError(_report(f"{what} took more than {timeout:g} s", self._stacks(list(waiting)), []))
        return [results[rank] for rank in range(self.world_size)]

    def _stack_file(self, rank: int) -> str:
        assert self._folder is not None
        return str(self._folder / f"stack-{rank}.txt")

    def _stacks(self, ranks: list[int]) -> dict[int, str]:
        """Where the given ranks stand now."""
        for rank in ranks:
            pid = self._processes[rank].pid
            if pid is not None and self._processes[rank].is_alive():
                os.kill(pid, signal.SIGUSR2)
        time.sleep(0.2)
        stacks = {}
        for rank in ranks:
            file = Path(self._stack_file(rank))
            stacks[rank] = (file.read_text() if file.exists() else "") or "no stack: the worker did not answer\n"
        return stacks


class Pools:
    """One pool for each world size that is asked for: ``pools(4).run(...)``."""

    def __init__(self) -> None:
        self._pools: dict[int, Pool] = {}

    def __call__(self, world_size: int) -> Pool:
        return self._pools.setdefault(world_size, Pool(world_size))

    def close(self) -> None:
        """End the workers of every pool."""
        for pool in self._pools.values():
            pool.close()


def _report(headline: str, texts: dict[int, str], silent: list[int]) -> str:
    """The ranks' texts, those that agree told once."""
    ranks_of: dict[str, list[int]] = {}
    for rank, text in sorted(texts.items()):
        ranks_of.setdefault(text, []).append(rank)
    lines = [f"{headline} on rank {', '.join(map(str, sorted(texts)))}"]
    lines += [f"\n--- rank {', '.join(map(str, ranks))} ---\n{text}" for text, ranks in ranks_of.items()]
    if silent:
        lines.append(f"\n--- rank {', '.join(map(str, silent))} ---\nhad not finished when the workers were ended\n")
    return "".join(lines)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


# ---------------------------------------------------------------------------------------------------------------------
# In the workers
# ---------------------------------------------------------------------------------------------------------------------


def settle() -> None:
    """Make a worker of this process."""
    import torch

    # The parent alone decides what an interrupt means; it ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Data loaders in here fork: a server per rank, with imports of its own, would take seconds for each of them.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    # What torch is about to remove must not be in use, in places that pytest's own filters do not reach.
    warnings.filterwarnings("error", category=FutureWarning)
    for others in (
        ".*LeafSpec",
        r"torch\.distributed\.nn\.functional",
        "`is_gradient_checkpointing`",
    ):  # Lightning, peft
        warnings.filterwarnings("default", message=others, category=FutureWarning)
    for key in [key for key in os.environ if key.startswith(_FOREIGN_LAUNCHERS)]:
        del os.environ[key]
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name need not resolve
    # What is loaded by now stays: the collection after each call need not walk through it.
    gc.collect()
    gc.freeze()


def _serve(rank: int, world_size: int, pipe: Connection, store_port: int, stack_file: str) -> None:
    """Answer calls until the pool goes away."""
    from torch.distributed import TCPStore

    settle()
    stacks = open(stack_file, "w")  # noqa: SIM115 - stays open for as long as the process lives
    faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=False)
    environment, folder = dict(os.environ), os.getcwd()
    store = TCPStore(HOST, store_port, is_master=False)
    pipe.send_bytes(pickle.dumps((True, None)))
    while True:
        try:
            message = pipe.recv_bytes()
        except (EOFError, ConnectionError):
            return
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        try:
            answer = pickle.dumps((True, _answer(message, rank, world_size, store)))
        except BaseException as error:  # pytest's outcomes and SystemExit too
            answer = pickle.dumps((False, describe(error)))
        pipe.send_bytes(answer)


def _answer(message: bytes, rank: int, world_size: int, store: Any) -> Any:
    """One call: a process group of its own, and nothing kept from the call before."""
    import torch.distributed as dist

    forget(rank)
    call: _Call = pickle.loads(message)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        NODE_RANK="0",
        WORLD_SIZE=str(world_size),
        MASTER_ADDR=HOST,
        MASTER_PORT=str(call.main_port),
    )
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore(f"call-{call.number}", store),
        rank=rank,
        world_size=world_size,
        # A little longer than the caller waits, so that it is the caller who reports a hang.
        timeout=timedelta(seconds=call.timeout + 10),
    )
    dist.barrier()
    return call.function(*call.args)


def forget(rank: int) -> None:
    """Undo what a call before may have left in this process, which is to be ``rank``.

    Its process groups end only here, when every rank has answered: a rank that closed its connections as soon as it was
    done (or had failed) would make its peers fail too, and hide the reason.
    """
    import torch
    import torch.distributed as dist
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()
    rank_zero_only.rank = rank
    random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)


def describe(error: BaseException) -> str:
    """The traceback of ``error`` without this file's own frames at its top."""
    frames = error.__traceback__
    while frames is not None and frames.tb_next is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames))
