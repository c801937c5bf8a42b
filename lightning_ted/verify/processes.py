"""Local CPU processes that do something together, and whose end is waited for whatever happens."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_ted.errors import TEDError, VerificationError

#: Seconds that the other processes get once one has failed: they may wait for it for ever.
_GRACE = 5.0


def run_together(world: int, function: Callable[..., Any], arguments: Sequence[Any], timeout: float) -> list[Any]:
    """Call ``function(*arguments)`` in ``world`` new processes, as a launcher of Lightning's would.

    They are forked where the system can, so that arguments need not be pickled; what a process changes in them, it changes for
    itself.

    Args:
        world: Number of processes.
        function: Of a module.
        arguments: Its arguments.
        timeout: Seconds that it may take.

    Returns:
        What it returned, by rank.

    Raises:
        TEDError: What a process raised of this package's; a :class:`VerificationError`, if it raised something else, died or did
            not end in time, or if an argument cannot be sent.

    """
    # A process that has used a GPU cannot be forked into one that computes gradients.
    forks = "fork" in multiprocessing.get_all_start_methods() and not torch.cuda.is_initialized()
    context = multiprocessing.get_context("fork" if forks else "spawn")
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), _free_port()
        processes = [
            context.Process(target=_rank, args=(rank, world, port, folder, function, arguments), daemon=False)  # type: ignore[attr-defined]
            for rank in range(world)
        ]
        try:
            for process in processes:
                process.start()
            _wait(processes, timeout)
            codes = [process.exitcode for process in processes]
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise VerificationError(
                f"The module or the batch cannot be sent to other processes ({error}). Define their classes in modules that can be "
                "imported, and build what cannot be pickled in `setup` or `configure_model`."
            ) from error
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
        if codes != [0] * world:
            raise _told(codes, folder, timeout)
        return [torch.load(folder / f"result{rank}", weights_only=False) for rank in range(world)]


def _wait(processes: Sequence[Any], timeout: float) -> None:
    """Until all have ended, or one has failed and the others had time to."""
    deadline = time.monotonic() + timeout
    while any(process.exitcode is None for process in processes) and time.monotonic() < deadline:
        if any(process.exitcode for process in processes):
            deadline = min(deadline, time.monotonic() + _GRACE)
        time.sleep(0.02)


def _told(codes: Sequence[int | None], folder: Path, timeout: float) -> TEDError:
    """What went wrong where, by the exit codes that there were before the others were ended."""
    # One that a signal has ended comes first: others say that they have lost it.
    failed = sorted((rank for rank, code in enumerate(codes) if code), key=lambda rank: (codes[rank] or 0) > 0)
    errors = (
        []
        if failed and (codes[failed[0]] or 0) < 0
        else [rank for rank in failed if (folder / f"error{rank}").exists()]
    )
    if errors:
        # The one that failed first; others say that they have lost it.
        first = min(errors, key=lambda rank: (folder / f"error{rank}").stat().st_mtime_ns)
        found = pickle.loads((folder / f"error{first}").read_bytes())
        if isinstance(found, TEDError):
            return found
        return VerificationError(f"A run of the module failed on rank {first} of {len(codes)}:\n{found.rstrip()}")
    if failed:
        printed = (folder / f"log{failed[0]}").read_text()[-2000:]
        died = f"rank {failed[0]} of {len(codes)} died ({codes[failed[0]]})"
        return VerificationError(f"A run of the module failed: {died}.\n{printed}".rstrip())
    late = ", ".join(str(rank) for rank, code in enumerate(codes) if code is None)
    return VerificationError(
        f"A run of the module had not ended after {timeout:g} s on rank {late} of {len(codes)}; raise `timeout` if it is slow."
    )


def _rank(
    rank: int, world: int, port: int, folder: Path, function: Callable[..., Any], arguments: Sequence[Any]
) -> None:
    """One process, until its end."""
    code = 1
    log = os.open(folder / f"log{rank}", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1"
    )
    os.environ["MASTER_PORT"] = str(port)
    try:
        torch.set_num_threads(1)
        torch.save(function(*arguments), folder / f"result{rank}")
        code = 0
    except BaseException as error:
        found = error if isinstance(error, TEDError) else traceback.format_exc()
        (folder / f"error{rank}").write_bytes(pickle.dumps(found))
    finally:
        # Without the exit handlers of the process that was forked.
        os._exit(code)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
