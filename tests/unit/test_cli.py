import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_ted.cli import main

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
    assert all(name in printed for name in ("fit", "validate", "test", "predict"))


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
