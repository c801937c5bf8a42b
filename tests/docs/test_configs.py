"""Every YAML in ``configs/`` is parsed, and run for two steps."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lightning_ted.cli import main

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_there_are_configs() -> None:
    assert ROOT / "configs" / "quickstart.yaml" in CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_parsed(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["lightning-ted", "fit", f"--config={path}", "--print_config"])
    with pytest.raises(SystemExit, match="0"):
        main()
    printed = yaml.safe_load(capsys.readouterr().out)
    written = yaml.safe_load(path.read_text())
    assert printed["trainer"]["strategy"]["class_path"].endswith("TEDStrategy")
    assert printed["model"]["class_path"] == written["model"]["class_path"]
    assert written["model"]["init_args"]["config"].items() <= printed["model"]["init_args"]["config"].items()


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_trains_for_two_steps(path: Path, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "lightning_ted", "fit", f"--config={path}"),
        *("--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.val_check_interval=1.0"),
        *("--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert "unigram entropy of the validation bytes" in done.stdout
    assert (tmp_path / "sample.txt").read_text().startswith("def ")
