from pathlib import Path

import pytest

from lightning_ted.progress import Bars, size_of


def run(folder: Path) -> None:
    with Bars() as bars:
        with bars.step("reading", 10) as advance:
            advance(10)
        with bars.watching("writing", folder, 4):
            (folder / "a").write_bytes(b"1234")


def test_a_terminal_is_told_of_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    run(tmp_path)
    printed = capsys.readouterr()
    assert "reading" in printed.err and "writing" in printed.err and not printed.out


def test_a_pipe_is_told_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path)
    assert not capsys.readouterr().err


def test_a_step_that_fails_ends_its_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with pytest.raises(OSError, match="full"), Bars() as bars, bars.watching("writing", tmp_path / "nowhere", 4):
        raise OSError("full")


def test_sizes_are_those_of_files(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_bytes(b"123")
    (tmp_path / "b").write_bytes(b"12")
    assert (size_of(tmp_path), size_of(tmp_path / "b"), size_of(tmp_path / "nowhere")) == (5, 2, 0)
