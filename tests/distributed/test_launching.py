"""However the processes are started, they train the same weights."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "tests" / "support" / "launch_script.py")
TIMEOUT = 240


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run(commands: Sequence[tuple[list[str], dict[str, str]]]) -> None:
    """Run programs beside each other; all have to succeed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(command, env=environment | extra, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command, extra in commands
    ]
    try:
        for program in started:
            output, _ = program.communicate(timeout=TIMEOUT)
            assert program.returncode == 0, output[-3000:]
    finally:
        for program in started:
            program.kill()


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.mark.slow
def test_every_way_of_launching_gives_the_same_weights(tmp_path: Path) -> None:
    run([([sys.executable, SCRIPT, str(tmp_path / "lightning.ckpt"), "2", "1"], {})])
    want = weights(tmp_path / "lightning.ckpt")

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    run([([*torchrun, SCRIPT, str(tmp_path / "torchrun.ckpt"), "2", "1"], {})])

    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    # `bash` is what SLURM calls an interactive job, in which Lightning would launch by itself.
    slurm = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NAME": "train", "SLURM_NODEID": "0"}
    slurm |= {"SLURM_NNODES": "1", "SLURM_JOB_ID": "1", "SLURM_NODELIST": "127.0.0.1"}
    command = [sys.executable, SCRIPT, str(tmp_path / "slurm.ckpt"), "2", "1"]
    ranks = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    run([(command, address | slurm | rank) for rank in ranks])

    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = [sys.executable, SCRIPT, str(tmp_path / "nodes.ckpt"), "1", "2"]
    run([(command, address | {"NODE_RANK": str(node)}) for node in range(2)])

    for way in ("torchrun", "slurm", "nodes"):
        got = weights(tmp_path / f"{way}.ckpt")
        assert got.keys() == want.keys()
        for name, weight in want.items():
            assert torch.equal(got[name], weight), f"{way}: {name}"


@pytest.mark.slow
def test_illegal_sizes_are_refused_before_any_process_starts(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, SCRIPT, str(tmp_path / "never.ckpt"), "3", "1", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode != 0
    assert "`tensor_parallel_size=2` does not divide the world size 3" in done.stderr
    assert "choose one of 1, 3" in done.stderr
    assert "MEMBER: 2/3" not in done.stderr + done.stdout
