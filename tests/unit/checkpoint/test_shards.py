import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_ted.checkpoint.shards import INDEX, plan_shards, read_shards, write_shard, write_shards
from lightning_ted.errors import CheckpointError


@pytest.mark.parametrize(
    ("limit", "plan"),
    [(10, [["a", "b", "c", "d"]]), (5, [["a", "b"], ["c", "d"]]), (4, [["a"], ["b"], ["c", "d"]])],
)
def test_tensors_are_put_into_shards_in_order(limit: int, plan: list[list[str]]) -> None:
    assert plan_shards({"a": 2, "b": 3, "c": 4, "d": 0}, limit) == plan


def test_a_tensor_larger_than_a_shard_is_alone() -> None:
    assert plan_shards({"a": 1, "b": 9, "c": 1}, 3) == [["a"], ["b"], ["c"]]
    assert plan_shards({}, 3) == [[]]


def write(folder: Path) -> None:
    folder.mkdir()
    tensors = {name: torch.full((2, 2), float(place)) for place, name in enumerate("abc")}
    plan = [["a"], ["b", "c"]]
    write_shards(folder, plan, lambda names: {name: tensors[name] for name in names}, {"tied": "b"}, {"epoch": 3})


def test_names_and_what_is_known_come_back(tmp_path: Path) -> None:
    write(tmp_path / "x")
    tensors, aliases, info = read_shards(tmp_path / "x")
    assert {name: tensor[0, 0].item() for name, tensor in tensors.items()} == {"a": 0, "b": 1, "c": 2}
    assert aliases == {"tied": "b"} and info == {"epoch": 3}


@pytest.mark.parametrize("content", [b"{}", b"[]", b"\xff", json.dumps({"weight_map": {"a": "../elsewhere"}}).encode()])
def test_an_index_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    write(tmp_path / "x")
    (tmp_path / "x" / INDEX).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{INDEX}' is damaged or something else"):
        read_shards(tmp_path / "x")


def test_a_tensor_that_a_shard_lacks_is_named(tmp_path: Path) -> None:
    write(tmp_path / "x")
    index: dict[str, Any] = json.loads((tmp_path / "x" / INDEX).read_text())
    index["weight_map"]["more"] = index["weight_map"]["a"]
    (tmp_path / "x" / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="names 'more', which its file does not hold"):
        read_shards(tmp_path / "x")


def test_files_that_no_index_tells_of_are_not_guessed(tmp_path: Path) -> None:
    write(tmp_path / "x")
    (tmp_path / "x" / INDEX).unlink()
    with pytest.raises(CheckpointError, match=f"holds 2 files of safetensors, and no {INDEX}"):
        read_shards(tmp_path / "x")


def test_a_dtype_that_the_format_has_not_got_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tensors of torch\.complex128"):
        write_shard(tmp_path / "x.safetensors", {"a": torch.zeros(2, dtype=torch.complex128)}, {}, {})
