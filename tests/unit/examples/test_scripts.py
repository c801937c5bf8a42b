"""The examples that are scripts or configurations run, shortened."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def _run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


@pytest.mark.slow
def test_adapters_are_trained_and_exported(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    out = _run("examples.huggingface_lora.train", f"--folder={tmp_path}", "--steps=3")
    found = re.search(r"validation loss: base ([\d.]+), with the exported adapters ([\d.]+), merged ([\d.]+)", out)
    assert found is not None and found[1] != found[2] and found[2] == found[3], out[-1000:]
    assert (tmp_path / "adapters" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_a_block_of_ones_own_trains(tmp_path: Path) -> None:
    _run(
        *("lightning_ted", "fit", "--config=examples/own_moe_block/config.yaml", "--trainer.max_steps=2"),
        *("--trainer.limit_val_batches=0", f"--trainer.default_root_dir={tmp_path}"),
    )
