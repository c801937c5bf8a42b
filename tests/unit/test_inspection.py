"""What ``lightning-ted inspect`` tells of checkpoints of every form."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_ted.convert import convert
from lightning_ted.errors import CheckpointError
from lightning_ted.inspection import describe, inspect
from tests.support.written import AVERAGES, INFO, LAYOUT, MOMENTS, WEIGHTS, write_directory

BYTES = sum(tensor.nbytes for tensor in WEIGHTS.values())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_directory(tmp_path_factory.mktemp("written") / "run")


@pytest.fixture(scope="module")
def file(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as one file."""
    out = tmp_path_factory.mktemp("file") / "run.ckpt"
    convert(str(written), str(out))
    return out


def sums(described: dict[str, Any]) -> dict[tuple[str, str], tuple[int, int]]:
    """Tensors and bytes, by part and dtype."""
    return {(part["part"], part["dtype"]): (part["tensors"], part["bytes"]) for part in described["parts"]}


@pytest.mark.parametrize("form", ["directory", "file"])
def test_what_is_in_it_is_told_of_both_forms(written: Path, file: Path, form: str) -> None:
    told = describe(written if form == "directory" else file)
    assert told["form"] == form
    for key in ("model", "global_step", "epoch", "layout", "precision", "versions"):
        assert told[key] == INFO[key]
    assert told["time"].startswith("2001-09-0")
    assert sums(told)["model", "float32"] == (3, 630 * 4) and sums(told)["model", "bfloat16"] == (1, 60)
    assert sums(told)["training", "float32"] == (6, 1260 * 4 + 8)  # with two counts of steps
    assert sums(told)["extra", "float32"] == (1, 2400)
    assert told["further_names"] == 1
    (optimizer,) = told["optimizers"]
    assert (optimizer["class"], optimizer["parameters"]) == ("AdamW", 3)
    assert optimizer["states"] == ["exp_avg", "exp_avg_sq", "step"]
    assert optimizer["groups"][1] == {"parameters": 2, "lr": 0.2, "betas": (0.9, 0.99)}
    assert told["callbacks"] == ["Averages"] and told["schedulers"] == 1
    assert told["other_keys"] == ["hyper_parameters"]
    assert (told["random_states"], told["loader_states"]) == (2, 0)


def test_every_tensor_is_listed_with_its_boxes(written: Path) -> None:
    told = {tensor["name"]: tensor for tensor in describe(written, tensors=True)["tensors"]}
    assert told.keys() >= WEIGHTS.keys() | MOMENTS.keys() | AVERAGES.keys()
    assert told["net.up.weight"] == {
        "part": "model",
        "name": "net.up.weight",
        "shape": [30, 20],
        "dtype": "float32",
        "bytes": 2400,
        "boxes": 2,
    }
    assert told["net.seen"]["shape"] == [] and told["optimizer/0/net.up.bias/step"]["boxes"] == 1


def test_json_is_what_is_described(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(str(written), tensors=True, verify=True, json=True)
    told = json.loads(capsys.readouterr().out)
    assert told.pop("path") == str(written) and told.pop("damages") == []
    assert told == json.loads(json.dumps(describe(written, tensors=True)))


def test_the_table_names_what_matters(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(str(written), tensors=True, verify=True)
    printed = capsys.readouterr().out
    told = {line.split("  ")[0].strip(): line for line in printed.splitlines()}
    for title, text in {
        "form": "directory, version 1",
        "checksums": "right",
        "model": "Model",
        "step": "12",
        "layout": "world_size=2, tensor=2",
        "tied weights": "1 further name",
        "random states": "2 ranks",
    }.items():
        assert text in told[title]
    assert "loaders' states" not in told
    assert "optimizer 0: AdamW, of each parameter: exp_avg, exp_avg_sq, step" in printed
    assert "optimizer/0/net.up.weight/exp_avg_sq" in printed  # not cut short outside a terminal


@pytest.mark.filterwarnings("ignore:Safetensors hold tensors alone")
def test_safetensors_tell_as_much_as_they_can(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(str(written), str(tmp_path / "hf"), to="safetensors", max_shard_size="1KB")
    told = describe(tmp_path / "hf")
    assert told["layout"] == LAYOUT and told["global_step"] == 12
    assert sum(part["bytes"] for part in told["parts"]) == BYTES
    inspect(str(tmp_path / "hf"), verify=True)
    assert "none to compare" in capsys.readouterr().out


def test_a_file_of_another_strategy_tells_of_its_states_by_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = torch.nn.Linear(3, 4)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    torch.save(
        {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()], "callbacks": {"C": {"n": 1}}},
        tmp_path / "plain.ckpt",
    )
    told = describe(tmp_path / "plain.ckpt")
    assert sums(told) == {("model", "float32"): (2, 64), ("training", "float32"): (2, 64)}
    assert told["layout"] is None and told["callbacks"] == ["C"]
    assert told["optimizers"][0]["class"] is None and told["optimizers"][0]["states"] == ["momentum_buffer"]
    inspect(str(tmp_path / "plain.ckpt"))
    assert "optimizer 0: of unnamed parameters, of each parameter: momentum_buffer" in capsys.readouterr().out


def test_every_damaged_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_directory(tmp_path / "run")
    for name in ("state.pt", "model/__0_0.distcp"):
        content = bytearray((folder / name).read_bytes())
        content[-3] ^= 4
        (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp' is damaged.*state\.pt' is damaged"):
        inspect(str(folder), verify=True, json=True)
    assert len(json.loads(capsys.readouterr().out)["damages"]) == 2


class Evil:
    """Does something when it is unpickled."""

    ran = False

    def __reduce__(self) -> Any:
        return exec, (f"import {__name__} as m; m.Evil.ran = True",)


@pytest.mark.parametrize("archive", [True, False])
def test_nothing_is_executed(tmp_path: Path, archive: bool) -> None:
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {}, "evil": Evil()}, path, _use_new_zipfile_serialization=archive)
    assert pickle.loads(pickle.dumps(Evil())) is None and Evil.ran
    Evil.ran = False
    with pytest.raises(CheckpointError, match="exec"):
        inspect(str(path), verify=True)
    with pytest.raises(CheckpointError, match="exec"):
        convert(str(path), str(tmp_path / "out"), weights_only=True)
    assert not Evil.ran


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        inspect(str(tmp_path / "nowhere"))
    (tmp_path / "last.ckpt").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=r"There is no checkpoint '.*last\.ckpt'"):
        inspect(str(tmp_path / "last.ckpt"))
    (tmp_path / "last.ckpt").unlink()
    with pytest.raises(CheckpointError, match=r"holds no manifest\.json\. The directory is empty"):
        inspect(str(tmp_path))
    with zipfile.ZipFile(tmp_path / "other.ckpt", "w") as other:
        other.writestr("text", "hello")
    with pytest.raises(CheckpointError, match=r"other\.ckpt' cannot be read as a checkpoint"):
        inspect(str(tmp_path / "other.ckpt"))
