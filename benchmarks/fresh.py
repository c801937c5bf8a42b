"""A function of a benchmark in fresh processes: what one measurement leaves behind must not show in the next."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def in_fresh_processes(
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    ranks: int = 1,
    threads: int | None = None,
    within: Callable[[int], Sequence[str]] | None = None,
) -> list[Any]:
    """Call ``function(**arguments)`` on every rank of a new world; the results by rank.

    Args:
        function: Of a module that can be imported; it makes the process group itself, if it wants one.
        arguments: What JSON can hold, as the results.
        ranks: Number of processes.
        threads: Of each; None for torch's own choice.
        within: Gives, for a rank, what its command is put behind.

    Raises:
        RuntimeError: If a process fails; with the ends of what they printed.

    """
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    if threads is not None:
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as folder:
        # By the name of the file's module, which is not that of a program that runs it.
        spec = sys.modules[function.__module__].__spec__
        assert spec is not None
        command = [sys.executable, "-m", "benchmarks.fresh", spec.name, function.__name__]
        command += [json.dumps(arguments), f"{folder}/result"]
        processes = []
        for rank in range(ranks):
            with open(f"{folder}/log{rank}", "w") as log:
                own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
                whole = [*(within(rank) if within else ()), *command]
                processes.append(subprocess.Popen(whole, env=own, stdout=log, stderr=subprocess.STDOUT))
        try:
            codes = [process.wait(timeout=900) for process in processes]
        finally:
            for process in processes:
                process.kill()
        if any(codes):
            logs = "\n".join(Path(f"{folder}/log{rank}").read_text()[-4000:] for rank in range(ranks))
            raise RuntimeError(f"{function.__name__}({arguments}) failed:\n{logs}")
        return [json.loads(Path(f"{folder}/result{rank}").read_text()) for rank in range(ranks)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> None:
    module, name, arguments, out = sys.argv[1:]
    warnings.filterwarnings("ignore", category=UserWarning)
    result = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    Path(f"{out}{os.environ['RANK']}").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
