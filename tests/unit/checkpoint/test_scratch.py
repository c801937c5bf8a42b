import os
from pathlib import Path

import pytest
import torch

from lightning_ted.checkpoint.scratch import room_for

WANTED = {
    "a": ((3, 5), torch.float32),
    "half": ((7,), torch.bfloat16),
    "flag": ((), torch.bool),
    "empty": ((0, 4), torch.float64),
    "eight": ((4, 2), torch.float8_e4m3fn),
}


def test_each_tensor_has_memory_of_its_own_and_no_file_is_left(tmp_path: Path) -> None:
    tensors = room_for(WANTED, tmp_path)
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} == WANTED
    for number, tensor in enumerate(tensors.values()):
        tensor.fill_(number)
    for number, tensor in enumerate(tensors.values()):
        assert torch.equal(tensor.float(), torch.full(tensor.shape, number).to(tensor.dtype).float())
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert tensor.data_ptr() % 64 == 0
    assert not os.listdir(tmp_path)


def test_they_are_saved_as_they_are(tmp_path: Path) -> None:
    tensors = room_for(WANTED, tmp_path)
    tensors["a"].normal_()
    torch.save(tensors, tmp_path / "x.pt")
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    assert torch.equal(loaded["a"], tensors["a"]) and loaded.keys() == WANTED.keys()


def test_too_much_is_an_error_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left|too large"):
        room_for({"a": ((2**50,), torch.float32)}, tmp_path)


def test_nothing_needs_no_file(tmp_path: Path) -> None:
    assert room_for({}, tmp_path / "nowhere") == {}
    assert room_for({"empty": ((0,), torch.int8)}, tmp_path / "nowhere")["empty"].shape == (0,)
