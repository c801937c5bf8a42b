import contextlib
import errno
import json
import os
import time
import zlib
from pathlib import Path

import pytest
import torch

from lightning_ted.checkpoint import directory
from lightning_ted.checkpoint.directory import MANIFEST, Manifest
from lightning_ted.checkpoint.files import check_file
from lightning_ted.errors import CheckpointError


def _written(final: Path, text: str = "content") -> Manifest:
    folder = directory.begin(final)
    (folder / "model").mkdir()
    (folder / "model" / "data").write_text(text)
    (folder / "state.pt").touch()
    manifest = Manifest({"state.pt": (0, 0), "model/data": (len(text), zlib.crc32(text.encode()))}, {"global_step": 3})
    manifest.write(folder)
    directory.publish(folder, final)
    return manifest


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_directory_is_there_only_when_it_is_complete(tmp_path: Path) -> None:
    final = tmp_path / "new" / "x.ckpt"
    folder = directory.begin(final)
    assert not final.exists() and folder.name.startswith(".")
    manifest = _written(final)
    assert _names(final.parent) == ["x.ckpt"]
    assert Manifest.read(final) == manifest
    manifest.check(final)


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_directory_replaces_another_one_or_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    if not exchanges:
        monkeypatch.setattr(directory, "_exchange", lambda *_: False)
    final = tmp_path / "x.ckpt"
    final.write_text("a file")
    for text in ("first", "second"):
        _written(final, text)
        assert (final / "model" / "data").read_text() == text
        assert _names(tmp_path) == ["x.ckpt"]


def test_what_was_replaced_when_the_process_was_killed_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "x.ckpt"
    _written(final)
    monkeypatch.setattr(directory, "_exchange", lambda *_: False)
    calls = []

    def rename(one: Path, other: Path) -> None:
        calls.append(other)
        if len(calls) == 2:
            raise KeyboardInterrupt
        Path(one).replace(other)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        _written(final, "second")
    assert not final.exists()
    assert (directory.restored(final) / "model" / "data").read_text() == "content"


def test_removing_hides_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "x.ckpt"
    _written(final)
    monkeypatch.setattr(directory.shutil, "rmtree", lambda *_, **__: None)  # killed here
    directory.remove(final)
    assert _names(tmp_path) == [".x.ckpt.ted_removed"]
    monkeypatch.undo()
    _written(final)
    assert _names(tmp_path) == ["x.ckpt"]
    directory.remove(tmp_path / "missing")


def test_what_killed_runs_have_left_is_removed_later(tmp_path: Path) -> None:
    for name, age in (("old", 7200), ("new", 0)):
        folder = directory.begin(tmp_path / name)
        (folder / "data").touch()
        for path in (folder / "data", folder):
            os.utime(path, (time.time() - age,) * 2)
    _written(tmp_path / "other")
    assert _names(tmp_path) == [".new.ted_incomplete", "other"]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "has 6 bytes instead of 7"),
        (_flip, "is damaged: its checksum is wrong"),
        (Path.unlink, "cannot be read .No such file"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, damage: object, message: str) -> None:
    manifest = _written(tmp_path / "x")
    damage(tmp_path / "x" / "model" / "data")  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=f"'{tmp_path}/x/model/data' {message}"):
        manifest.check(tmp_path / "x")


@pytest.mark.parametrize("damage", [_truncate, _flip])
def test_a_damaged_manifest_is_named(tmp_path: Path, damage: object) -> None:
    _written(tmp_path / "x")
    damage(tmp_path / "x" / MANIFEST)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=f"'{tmp_path}/x/manifest.json' is damaged or something else"):
        Manifest.read(tmp_path / "x")


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    _written(tmp_path / "x")
    path = tmp_path / "x" / MANIFEST
    good, want = path.read_bytes(), Manifest.read(tmp_path / "x")
    for at in range(0, len(good), 3):
        bad = bytearray(good)
        bad[at] ^= 1
        path.write_bytes(bad)
        with contextlib.suppress(CheckpointError):
            assert Manifest.read(tmp_path / "x") == want  # white space, or a number's last digit that rounds


@pytest.mark.parametrize(("content", "message"), [(None, "is empty"), ("meta.pt", "written by something else")])
def test_a_foreign_directory_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / content).touch()
    with pytest.raises(CheckpointError, match=f"'{tmp_path}' is no checkpoint of this package.*{message}"):
        Manifest.read(tmp_path)


def test_a_later_version_is_refused(tmp_path: Path) -> None:
    _written(tmp_path / "x")
    body = json.loads((tmp_path / "x" / MANIFEST).read_text())
    del body["checksum"]
    body["version"] = 2
    (tmp_path / "x" / MANIFEST).write_text(json.dumps({**body, "checksum": directory._checksum(body)}))
    with pytest.raises(CheckpointError, match="is of version 2 of the format, this package knows 1"):
        Manifest.read(tmp_path / "x")


def test_files_are_checked_by_their_own_checksums(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"w": torch.zeros(1000)}, path)
    check_file(path)
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"'.*x\.ckpt' is damaged: the checksum of '.*data/0' is wrong"):
        check_file(path)
    path.write_bytes(data[:1000])
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        check_file(path)
    data[2000] ^= 1
    path.write_bytes(data + b"more")
    with pytest.raises(CheckpointError, match="goes on behind its end"):
        check_file(path)


def test_checkpoints_are_listed_the_newest_first(tmp_path: Path) -> None:
    for age, name in enumerate(("a", "b")):
        _written(tmp_path / name)
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    (tmp_path / "c.ckpt").touch()
    os.utime(tmp_path / "c.ckpt", (time.time() - 9,) * 2)
    (tmp_path / "notes.txt").touch()
    assert [path.name for path in directory.checkpoints_in(tmp_path)] == ["a", "b", "c.ckpt"]
    assert list(directory.checkpoints_in(tmp_path / "missing")) == []


def test_hidden_names_are_taken_for_no_checkpoint_by_those_who_look_for_a_part_of_the_name(tmp_path: Path) -> None:
    final = tmp_path / "hpc_ckpt_2 100%.ckpt"
    folder = directory.begin(final, "token")
    assert "hpc_ckpt_" not in folder.name and "token" in folder.name
    assert directory._shown(directory._hidden(final, "ted_replaced")) == final
    directory.begin(final, "other")
    assert not folder.exists()  # of a run that was killed


def test_only_hidden_names_of_this_package_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".theirs.removed").mkdir()
    (tmp_path / ".ours.ted_removed").mkdir()
    _written(tmp_path / "x")
    assert _names(tmp_path) == [".theirs.removed", "x"]


def test_links_that_lead_nowhere_lead_to_the_newest_checkpoint_again(tmp_path: Path) -> None:
    for age, name in enumerate(("new", "old")):
        _written(tmp_path / name)
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    (tmp_path / "last.ckpt").symlink_to("never completed")
    (tmp_path / "fine.ckpt").symlink_to("old")
    directory.recover(tmp_path)
    assert os.readlink(tmp_path / "last.ckpt") == "new" and os.readlink(tmp_path / "fine.ckpt") == "old"
    assert _names(tmp_path) == ["fine.ckpt", "last.ckpt", "new", "old"]


def test_what_is_to_be_seen_is_told_to_be_written_even_if_that_may_be_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def fails(handle: int) -> None:
        if (tmp_path / "x.ckpt").exists():
            raise OSError(errno.EIO, "Input/output error")
        sync(handle)

    monkeypatch.setattr(os, "fsync", fails)
    _written(tmp_path / "x.ckpt")
    assert _names(tmp_path) == ["x.ckpt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [("notes.txt", "is a directory of something else"), ("x.ckpt/notes.txt", "or holds something else as well")],
)
def test_what_is_not_a_checkpoint_is_not_replaced(tmp_path: Path, content: str, message: str) -> None:
    final = tmp_path / "x.ckpt"
    if "/" in content:
        _written(final)
    else:
        final.mkdir()
    (final / "notes.txt").write_text("precious")
    with pytest.raises(CheckpointError, match=message):
        directory.begin(final)
    assert (final / "notes.txt").read_text() == "precious"


def test_files_that_are_no_checkpoints_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("precious")
    with pytest.raises(CheckpointError, match="'.*thesis' is a file of something else"):
        directory.begin(tmp_path / "thesis")
    torch.save({}, tmp_path / "archive")
    directory.begin(tmp_path / "archive")


@pytest.mark.parametrize(
    "change", [{"version": "x"}, {"files": []}, {"files": {"a": 1}}, {"files": {}}, {"info": None}]
)
def test_a_forged_manifest_is_named(tmp_path: Path, change: dict[str, object]) -> None:
    _written(tmp_path / "x")
    body = json.loads((tmp_path / "x" / MANIFEST).read_text())
    del body["checksum"]
    body |= change
    (tmp_path / "x" / MANIFEST).write_text(json.dumps({**body, "checksum": directory._checksum(body)}))
    with pytest.raises(CheckpointError, match="manifest.json' is damaged or something else"):
        Manifest.read(tmp_path / "x")
