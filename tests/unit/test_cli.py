import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_ted.cli import main
from tests.support.written import write_directory

BORING = "--model=lightning.pytorch.demos.boring_classes.BoringModel"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``run("fit", "--help")`` in this process."""

    def run(*args: str) -> None:
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(sys, "argv", ["lightning-ted", *args])
        main()

    return run


def test_importing_the_command_imports_neither_torch_nor_lightning() -> None:
    heavy = ["torch", "lightning", "jsonargparse"]
    code = f"import sys, lightning_ted.cli; sys.exit(any(name in sys.modules for name in {heavy}))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_names_the_subcommands(run: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        run("--help")
    printed = capsys.readouterr().out
    assert printed.startswith("usage: lightning-ted")
    assert all(name in printed for name in ("fit", "validate", "test", "predict", "convert", "inspect"))
    assert "Write a checkpoint in another form" in printed


def test_help_of_the_strategy_comes_from_its_docstring(
    run: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        run("fit", "--trainer.strategy.help=lightning_ted.TEDStrategy")
    printed = capsys.readouterr().out
    assert "--trainer.strategy.tensor_parallel_size" in printed
    assert "Ranks that share each ordinary layer" in printed


@pytest.mark.parametrize("strategy", ["ted", "lightning_ted.TEDStrategy"])
def test_the_strategy_is_known_by_name_and_by_class(
    run: Callable[..., None], strategy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        run("fit", BORING, f"--trainer.strategy={strategy}", "--print_config")
    assert strategy in capsys.readouterr().out


def test_a_model_in_the_working_directory_is_found(
    run: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = "from lightning.pytorch.demos.boring_classes import BoringModel\nclass Mine(BoringModel):\n    pass\n"
    (tmp_path / "model_of_a_user.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="0"):
        run("fit", "--model=model_of_a_user.Mine", "--print_config")
    assert "model_of_a_user.Mine" in capsys.readouterr().out


# LightningCLI calls methods that jsonargparse has renamed since.
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_sizes_that_do_not_divide_end_the_command_with_a_message(run: Callable[..., None]) -> None:
    with pytest.raises(SystemExit, match=r"`tensor_parallel_size=3` does not divide .*choose one of 1, 2, 4"):
        run(
            "fit",
            BORING,
            "--seed_everything=1",
            "--trainer.logger=false",
            "--trainer.accelerator=cpu",
            "--trainer.devices=4",
            "--trainer.strategy=lightning_ted.TEDStrategy",
            "--trainer.strategy.tensor_parallel_size=3",
        )


# -- commands for checkpoints ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "texts"),
    [
        (
            "convert",
            [
                "usage: lightning-ted convert",
                "--max-shard-size",
                "--weights-only",
                "Leave out the states",
                "source out",
            ],
        ),
        ("inspect", ["usage: lightning-ted inspect", "--verify", "List every tensor"]),
    ],
)
def test_help_of_a_command_comes_from_its_docstring(
    run: Callable[..., None], capsys: pytest.CaptureFixture[str], command: str, texts: list[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        run(command, "--help")
    printed = capsys.readouterr().out
    assert all(text in printed for text in texts)


def test_a_checkpoint_is_converted_and_inspected(
    run: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = write_directory(tmp_path / "run"), tmp_path / "out.ckpt"
    run("convert", str(folder), str(out), "--dtype=bf16", "--weights-only", "--max-shard-size", "1GB")
    assert "has been written: one file" in capsys.readouterr().out
    run("inspect", "--json", "--tensors", str(out))
    told = json.loads(capsys.readouterr().out)
    assert {tensor["dtype"] for tensor in told["tensors"]} == {"bfloat16", "int64"}
    with pytest.raises(SystemExit, match="lightning-ted: error: .* exists"):
        run("convert", str(folder), str(out))
    run("convert", str(folder), str(out), "--overwrite", "--to=directory")
    assert (out / "manifest.json").exists()


@pytest.mark.slow
def test_a_damaged_checkpoint_ends_inspect_with_status_one(tmp_path: Path) -> None:
    folder = write_directory(tmp_path / "run")
    (folder / "state.pt").write_bytes(b"else")
    command = [sys.executable, "-m", "lightning_ted", "inspect", str(folder), "--verify"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("lightning-ted: error: ") and "state.pt' has 4 bytes instead of" in done.stderr


def test_a_misspelled_argument_is_refused(run: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run("convert", "a", "b", "--dtype=fp16")
    assert "fp16" in capsys.readouterr().err
