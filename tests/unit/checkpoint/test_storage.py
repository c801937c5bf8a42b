import pickle
import zlib
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lightning_ted.checkpoint.boxes import Box
from lightning_ted.checkpoint.portions import Portion
from lightning_ted.checkpoint.reader import Tensors
from lightning_ted.checkpoint.writer import write_portions
from lightning_ted.errors import CheckpointError

TENSORS = {
    "a": torch.randn(30, 40),
    "number": torch.tensor(3),
    "empty": torch.empty(0, 3),
    "half": torch.randn(300, 40).bfloat16(),
    "view": torch.randn(8, 8)[2:4],
    "turned": torch.randn(5, 4).t(),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sums = write_portions(tmp_path / "x", {name: Portion.whole(tensor) for name, tensor in TENSORS.items()}, None)
    files = {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()}
    assert sums == {name: (len(data), zlib.crc32(data)) for name, data in files.items()}
    return tmp_path / "x"


def test_tensors_come_back_bit_for_bit(folder: Path) -> None:
    tensors = Tensors(folder)
    assert tensors.shapes == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    assert tensors.dtypes == {name: tensor.dtype for name, tensor in TENSORS.items()}
    assert all(torch.equal(tensors.whole(name), tensor) for name, tensor in TENSORS.items())
    assert tensors.bytes_read == tensors.nbytes == sum(tensor.nbytes for tensor in TENSORS.values())


def test_only_what_a_box_needs_is_read(folder: Path) -> None:
    tensors, wanted = Tensors(folder), torch.empty(5, 7)
    tensors.read({"a": Portion((30, 40), torch.float32, [Box((3, 4), (5, 7))], [wanted])})
    assert torch.equal(wanted, TENSORS["a"][3:8, 4:11])
    assert tensors.bytes_read == wanted.nbytes


def test_another_dtype_is_converted(folder: Path) -> None:
    wanted = torch.empty(300, 40)
    Tensors(folder).read({"half": Portion.whole(wanted)})
    assert torch.equal(wanted, TENSORS["half"].float())


def test_torchs_own_tools_read_the_files(folder: Path, tmp_path: Path) -> None:
    dcp_to_torch_save(folder, tmp_path / "plain.pt")
    plain = torch.load(tmp_path / "plain.pt", weights_only=True)
    assert plain.keys() == TENSORS.keys()
    assert all(torch.equal(plain[name], tensor) for name, tensor in TENSORS.items())


def test_a_tensor_of_another_shape_is_refused_by_name(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'a' is of shape \[30, 41\] here, and of \(30, 40\) in"):
        Tensors(folder).read({"a": Portion.whole(torch.empty(30, 41))})


def test_a_truncated_file_is_named(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(Exception, match="__0_0.distcp' cannot be read"):
        Tensors(folder).whole("half")


class _Evil:
    def __reduce__(self) -> tuple:
        return (print, ("executed",))


def test_an_index_executes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(CheckpointError, match=r"\.metadata' cannot be read .*builtins\.print, which no index holds"):
        Tensors(folder)
    assert "executed" not in capsys.readouterr().out
