"""A checkpoint is the same in every form."""

from __future__ import annotations

import errno
import json
import os
import resource
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_ted.checkpoint.distributed import Source
from lightning_ted.convert import convert
from lightning_ted.errors import CheckpointError
from tests.support.written import (
    AVERAGES,
    INFO,
    LAYOUT,
    MOMENTS,
    PARAMETERS,
    RANKS,
    WEIGHTS,
    state,
    write_directory,
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_directory(tmp_path_factory.mktemp("written") / "run")


@pytest.fixture(scope="module")
def file(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as one file."""
    out = tmp_path_factory.mktemp("file") / "run.ckpt"
    convert(str(written), str(out))
    return out


def assert_same(got: Any, expected: Any) -> None:
    """Equal in every bit, whatever is nested in what."""
    if isinstance(expected, Tensor):
        assert got.dtype == expected.dtype and torch.equal(got, expected)
    elif isinstance(expected, dict):
        assert list(got) == list(expected)
        for key in expected:
            assert_same(got[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert type(got) is type(expected) and len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other)
    else:
        assert got == expected


def read(part: Any) -> dict[str, Tensor]:
    return {name: part.whole(name) for name in sorted(part.shapes)}


def assert_is_written(folder: Path) -> None:
    """It holds what ``write_directory`` has put there."""
    source = Source(folder, None)
    for part, expected in ((source.model, WEIGHTS), (source.training, MOMENTS), (source.extra, AVERAGES)):
        assert_same(read(part), dict(sorted(expected.items())))
    assert_same(dict(sorted(source.state.items())), dict(sorted(state().items())))
    assert_same(source.ranks, RANKS)
    assert source.manifest.info == INFO


# -- directory and file ------------------------------------------------------------------------------------------------------


def test_one_file_holds_what_lightning_would_have_written(file: Path) -> None:
    got = torch.load(file, weights_only=True)
    weights = got["state_dict"]
    assert list(weights) == state()["state_dict"]["order"]
    for name, expected in WEIGHTS.items():
        assert_same(weights[name], expected)
    assert weights["net.tied"].data_ptr() == weights["net.up.weight"].data_ptr()
    assert weights["net._extra_state"] == {"plain": 1}
    assert weights._metadata == {"": {"version": 1}}
    optimizer = got["optimizer_states"][0]
    assert [group["params"] for group in optimizer["param_groups"]] == [[0], [1, 2]]
    assert optimizer["param_groups"][1]["lr"] == 0.2
    assert optimizer["state"].keys() == {0, 1}
    for number, name in enumerate(PARAMETERS[:2]):
        assert optimizer["state"][number].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert_same(optimizer["state"][number]["exp_avg"], MOMENTS[f"optimizer/0/{name}/exp_avg"])
    averages = {"net.up.weight": AVERAGES["callbacks.Averages.net.up.weight"], "decay": 0.5}
    assert_same(got["callbacks"], {"Averages": averages})
    assert got["lr_schedulers"] == [{"last_epoch": 3}] and got["global_step"] == 12
    assert_same(got["lightning_ted"]["ranks"], RANKS["ranks"])


def test_torch_resumes_from_the_states_of_one_file(file: Path) -> None:
    parameters = [nn.Parameter(WEIGHTS[name].clone()) for name in PARAMETERS]
    optimizer = torch.optim.AdamW([{"params": parameters[:1]}, {"params": parameters[1:]}])
    optimizer.load_state_dict(torch.load(file, weights_only=True)["optimizer_states"][0])
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert_same(optimizer.state[parameters[1]]["exp_avg"], MOMENTS["optimizer/0/net.up.bias/exp_avg"])


def test_a_directory_comes_back_from_one_file(file: Path, tmp_path: Path) -> None:
    convert(str(file), str(tmp_path / "back"))
    assert_is_written(tmp_path / "back")


def test_a_directory_is_copied_to_a_directory(written: Path, tmp_path: Path) -> None:
    convert(str(written), str(tmp_path / "copy.ckpt"), to="directory")
    assert_is_written(tmp_path / "copy.ckpt")


def test_weights_alone_leave_out_what_training_needs(written: Path, tmp_path: Path) -> None:
    convert(str(written), str(tmp_path / "weights.ckpt"), weights_only=True)
    got = torch.load(tmp_path / "weights.ckpt", weights_only=True)
    assert got["lightning_ted"]["ranks"] == [] and got["hyper_parameters"] == {"width": 20}
    assert not got.keys() & {"optimizer_states", "lr_schedulers", "callbacks"}
    convert(str(written), str(tmp_path / "weights"), weights_only=True)
    source = Source(tmp_path / "weights", None)
    assert source.training is None and source.extra is None and not source.ranks
    assert_same(read(source.model), dict(sorted(WEIGHTS.items())))


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
@pytest.mark.parametrize("out", ["out", "out.ckpt"])
def test_only_floating_point_weights_change_their_dtype(
    written: Path, tmp_path: Path, name: Any, dtype: torch.dtype, out: str
) -> None:
    convert(str(written), str(tmp_path / out), dtype=name)
    convert(str(tmp_path / out), str(tmp_path / "read"), to="directory")
    source = Source(tmp_path / "read", None)
    expected = {key: value.to(dtype) if value.is_floating_point() else value for key, value in WEIGHTS.items()}
    assert_same(read(source.model), dict(sorted(expected.items())))
    assert_same(read(source.training), dict(sorted(MOMENTS.items())))
    assert_same(read(source.extra), dict(sorted(AVERAGES.items())))


# -- files of other strategies -----------------------------------------------------------------------------------------------


def plain_file(path: Path, named: bool = False, **rest: Any) -> tuple[Path, nn.Module, torch.optim.Optimizer]:
    """What Lightning writes with any other strategy."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(model.named_parameters() if named else model.parameters())
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    checkpoint = {
        "epoch": 1,
        "global_step": 1,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [],
        **rest,
    }
    torch.save(checkpoint, path)
    return path, model, optimizer


def test_states_by_number_are_refused_for_a_directory_and_the_way_out_is_named(tmp_path: Path) -> None:
    path, model, _ = plain_file(tmp_path / "plain.ckpt")
    with pytest.raises(CheckpointError, match="does not tell which parameter.*`--weights-only`.*resume from the file"):
        convert(str(path), str(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["plain.ckpt"]
    convert(str(path), str(tmp_path / "out"), weights_only=True)
    assert_same(read(Source(tmp_path / "out", None).model), dict(sorted(model.state_dict().items())))


def test_states_by_number_stay_so_in_a_file(tmp_path: Path) -> None:
    path, _, optimizer = plain_file(tmp_path / "plain.ckpt")
    convert(str(path), str(tmp_path / "out.ckpt"), dtype="bf16")
    got = torch.load(tmp_path / "out.ckpt", weights_only=True)
    assert got["state_dict"]["0.weight"].dtype == torch.bfloat16
    assert_same(got["optimizer_states"], [optimizer.state_dict()])


def test_names_that_torch_has_kept_are_used(tmp_path: Path) -> None:
    path, _, optimizer = plain_file(tmp_path / "plain.ckpt", named=True)
    convert(str(path), str(tmp_path / "out"))
    source = Source(tmp_path / "out", None)
    assert source.state["optimizer_states"][0]["param_groups"][0]["params"] == [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
    ]
    assert_same(source.training.whole("optimizer/0/1.bias/exp_avg"), optimizer.state_dict()["state"][3]["exp_avg"])
    assert not source.ranks
    convert(str(tmp_path / "out"), str(tmp_path / "back.ckpt"))
    got = torch.load(tmp_path / "back.ckpt", weights_only=True)
    assert_same(got["optimizer_states"][0]["param_groups"], optimizer.state_dict()["param_groups"])


def test_objects_are_refused_by_name(tmp_path: Path) -> None:
    path, _, _ = plain_file(tmp_path / "plain.ckpt", hyper_parameters=Namespace(width=3))
    with pytest.raises(
        CheckpointError, match=r"more than tensors and plain data: argparse\.Namespace\. To read that could"
    ):
        convert(str(path), str(tmp_path / "out"), weights_only=True)


# -- safetensors -------------------------------------------------------------------------------------------------------------


def test_safetensors_are_written_in_shards_with_an_index(written: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="tensors alone, and so not: net._extra_state"):
        convert(str(written), str(tmp_path / "hf"), to="safetensors", max_shard_size="2.4KB")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in WEIGHTS.values())
    assert index["weight_map"].keys() == WEIGHTS.keys()
    for name, shard in index["weight_map"].items():
        assert_same(load_file(tmp_path / "hf" / shard)[name], WEIGHTS[name])
    with safe_open(tmp_path / "hf" / files[0], framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "pt" and metadata["net.tied"] == "net.up.weight"
    plain = tmp_path / "plain"
    plain.touch()
    assert {path.stat().st_mode for path in (tmp_path / "hf").iterdir()} == {plain.stat().st_mode}


@pytest.mark.filterwarnings("ignore:Safetensors hold tensors alone")
@pytest.mark.parametrize(("out", "to"), [("hf", "safetensors"), ("weights.safetensors", None)])
def test_weights_come_back_from_safetensors(written: Path, tmp_path: Path, out: str, to: Any) -> None:
    convert(str(written), str(tmp_path / out), to=to, dtype="bf16")
    single = tmp_path / out if to is None else tmp_path / out / "model.safetensors"
    assert load_file(single).keys() == WEIGHTS.keys()
    convert(str(tmp_path / out), str(tmp_path / "back.ckpt"), dtype="fp32")
    got = torch.load(tmp_path / "back.ckpt", weights_only=True)
    assert got["state_dict"]["net.tied"].data_ptr() == got["state_dict"]["net.up.weight"].data_ptr()
    assert_same(got["state_dict"]["net.up.bias"], WEIGHTS["net.up.bias"].bfloat16().float())
    assert (got["global_step"], got["epoch"]) == (12, 3)
    convert(str(tmp_path / out), str(tmp_path / "back"))
    source = Source(tmp_path / "back", None)
    assert source.manifest.info["layout"] == LAYOUT
    assert_same(source.model.whole("net.half"), WEIGHTS["net.half"])
    assert sorted(os.listdir(tmp_path)) == sorted([out, "back", "back.ckpt"])


def test_safetensors_of_others_are_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "theirs").mkdir()
    save_file({"a": torch.ones(3)}, tmp_path / "theirs" / "pytorch_lora.safetensors")
    convert(str(tmp_path / "theirs"), str(tmp_path / "out.ckpt"))
    assert_same(dict(torch.load(tmp_path / "out.ckpt", weights_only=True)["state_dict"]), {"a": torch.ones(3)})


# -- refusals ----------------------------------------------------------------------------------------------------------------


def test_nothing_is_replaced_unasked(written: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.ckpt"
    out.write_text("precious")
    with pytest.raises(
        CheckpointError, match=r"out\.ckpt' exists\. Choose another name, or replace it with `--overwrite`"
    ):
        convert(str(written), str(out))
    assert out.read_text() == "precious"
    convert(str(written), str(out), overwrite=True)
    assert torch.load(out, weights_only=True)["global_step"] == 12
    convert(str(written), str(out), to="directory", overwrite=True)
    assert_is_written(out)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "precious").touch()
    with pytest.raises(CheckpointError, match="is a directory of something else, or holds something"):
        convert(str(written), str(folder), overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["folder", "out.ckpt"]


@pytest.mark.parametrize("out", [".", "model/inside", ".."])
def test_a_checkpoint_is_not_written_over_or_into_itself(written: Path, out: str) -> None:
    with pytest.raises(CheckpointError, match="are, or contain, each other"):
        convert(str(written), str(written / out), overwrite=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_shard_size": "many"}, "`max_shard_size=many` is no size of a file; write it as 500MB"),
        ({"max_shard_size": "0GB"}, "`max_shard_size=0GB` is no size"),
        ({"out": "x.safetensors", "to": "file"}, r"let its name end in \.ckpt"),
        ({"source": "nowhere"}, "There is no checkpoint 'nowhere'"),
    ],
)
def test_what_makes_no_sense_is_refused(written: Path, tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    out = str(tmp_path / arguments.pop("out", "out"))
    with pytest.raises(CheckpointError, match=message):
        convert(**{"source": str(written), "out": out, **arguments})
    assert not os.listdir(tmp_path)


def flip(path: Path) -> None:
    """Change one bit of a weight."""
    content = bytearray(path.read_bytes())
    content[content.index(WEIGHTS["net.up.weight"][0].numpy().tobytes())] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: flip(folder / "model" / "__0_0.distcp"), r"__0_0\.distcp' is damaged: its checksum is wrong"),
        (lambda folder: (folder / "state.pt").unlink(), r"state\.pt' cannot be read"),
        (
            lambda folder: (folder / "manifest.json").unlink(),
            "is no checkpoint of this package: it holds no manifest.json",
        ),
    ],
)
def test_a_damaged_directory_is_refused(tmp_path: Path, harm: Callable[[Path], None], message: str) -> None:
    harm(write_directory(tmp_path / "run"))
    with pytest.raises(CheckpointError, match=message):
        convert(str(tmp_path / "run"), str(tmp_path / "out.ckpt"))
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        ("run.ckpt", flip, r"run\.ckpt' is damaged: the checksum of '.*' is wrong"),
        (
            "run.ckpt",
            lambda path: path.write_bytes(path.read_bytes()[:3000]),
            r"run\.ckpt' cannot be read as a checkpoint",
        ),
        ("run.ckpt", lambda path: path.write_bytes(b""), r"run\.ckpt' cannot be read as a checkpoint"),
        ("run.ckpt", lambda path: torch.save([1, 2], path), r"run\.ckpt' is no checkpoint of Lightning"),
        ("run.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-9]), "cannot be read as safetensors"),
    ],
)
@pytest.mark.filterwarnings("ignore:Safetensors hold tensors alone")
def test_a_damaged_file_is_refused(
    written: Path, tmp_path: Path, name: str, harm: Callable[[Path], None], message: str
) -> None:
    convert(str(written), str(tmp_path / name))
    harm(tmp_path / name)
    with pytest.raises(CheckpointError, match=message):
        convert(str(tmp_path / name), str(tmp_path / "out"))
    assert os.listdir(tmp_path) == [name]


def test_a_shard_that_is_missing_is_named(written: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning):
        convert(str(written), str(tmp_path / "hf"), to="safetensors", max_shard_size="2.4KB")
    (tmp_path / "hf" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors' cannot be read"):
        convert(str(tmp_path / "hf"), str(tmp_path / "out"))


# -- places that cannot be written -------------------------------------------------------------------------------------------


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Files cannot be larger: what a full disk is like, in one process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("out", "limit"),
    # There is no room to read into, or none to write into.
    [(out, 100) for out in ("out", "out.ckpt", "out.safetensors")]
    + [("out", 6000), ("out.ckpt", 6000), ("out.safetensors", 3000)],
)
@pytest.mark.filterwarnings("ignore:Safetensors hold tensors alone")
def test_a_full_disk_leaves_everything_as_it_was(written: Path, tmp_path: Path, out: str, limit: int) -> None:
    convert(str(written), str(tmp_path / out))
    before = sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*"))
    with (
        largest_file(limit),
        pytest.raises(CheckpointError, match=f"{out}' could not be written .*nothing has been changed"),
    ):
        convert(str(written), str(tmp_path / out), overwrite=True)
    assert os.listdir(tmp_path) == [out]
    assert sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*")) == before


def test_a_place_that_cannot_be_written_is_named(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file/out' could not be written"):
        convert(str(written), str(tmp_path / "file" / "out"))

    def refuse(**_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(
        CheckpointError, match=r"out' could not be written \(Permission denied\); nothing has been changed"
    ):
        convert(str(written), str(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["file"]


# -- memory ------------------------------------------------------------------------------------------------------------------


def own_memory() -> int:
    """Bytes of this process that no file could give back."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    start, done = own_memory(), threading.Event()
    peak = [0]

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], own_memory() - start)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """150 MB in 50 tensors, as a directory and as a file."""
    weights = {f"net.{i}.weight": torch.full((750, 1000), float(i)) for i in range(50)}
    folder = tmp_path_factory.mktemp("large")
    return {"file": folder / "plain.ckpt", "directory": write_large(folder, weights)}


def write_large(folder: Path, weights: dict[str, Tensor]) -> Path:
    torch.save({"state_dict": weights, "epoch": 0, "global_step": 0}, folder / "plain.ckpt")
    convert(str(folder / "plain.ckpt"), str(folder / "run"))
    return folder / "run"


@pytest.mark.skipif(sys.platform != "linux", reason="asks the system in Linux's way")
@pytest.mark.parametrize(
    ("source", "out", "dtype"),
    [
        ("directory", "out.ckpt", None),
        ("directory", "out.safetensors", "bf16"),
        ("file", "out", None),
        ("file", "out", "bf16"),
    ],
)
def test_memory_holds_a_few_tensors_at_a_time(
    large: dict[str, Path], tmp_path: Path, source: str, out: str, dtype: Any
) -> None:
    with peak_memory() as peak:
        convert(str(large[source]), str(tmp_path / out), dtype=dtype)
    assert peak[0] < 40e6
