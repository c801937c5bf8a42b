"""Checkpoints are read by any layout; one-file ones by DDP and ``load_from_checkpoint``, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_ted.errors import CheckpointError
from tests.support.pool import Pools
from tests.support.runs import Toy, assert_close, loader, trainer, whole_weights

BATCH = {"ddp": 4, "tp2": 4, "tp2 file": 4, "tp2 etp1": 4, "ep4": 2, "tp4": 8, "tp4 etp1": 8}


def _start(layout: str, folder: str) -> dict[str, Tensor]:
    """Two epochs of four, with a checkpoint behind them and one behind all four."""
    run = trainer(layout, max_epochs=2)
    run.fit(Toy(), loader(BATCH[layout]))
    # Another path on every rank: the first rank's counts.
    run.save_checkpoint(f"{folder}/half.ckpt" if dist.get_rank() == 0 else f"{folder}/other.ckpt")
    run.save_checkpoint(f"{folder}/weights.ckpt", weights_only=True)
    whole = trainer(layout, max_epochs=4)
    whole.fit(Toy(), loader(BATCH[layout]))
    return whole_weights(whole)


def _resume(layout: str, path: str) -> dict[str, Tensor]:
    run = trainer(layout, max_epochs=4)
    run.fit(Toy(lr=123.0), loader(BATCH[layout]), ckpt_path=path, weights_only=True)
    return whole_weights(run)


@pytest.mark.parametrize("form", ["tp2", "tp2 file"], ids=["directory", "file"])
def test_checkpoint_moves_between_layouts(pools: Pools, tmp_path: Path, form: str) -> None:
    expected = pools(4).run(_start, form, str(tmp_path))[0]
    path = str(tmp_path / "half.ckpt")
    assert not (tmp_path / "other.ckpt").exists()
    for layout in ("tp2", "tp4", "tp4 etp1", "ep4", "tp2 etp1"):
        for got in pools(4).run(_resume, layout, path):
            if layout == "tp2":
                assert all(torch.equal(got[name], expected[name]) for name in expected)
            else:
                assert_close(got, expected, 1e-4)
    if form == "tp2":
        return
    assert_close(pools(2).run(_resume, "ddp", path)[0], expected, 1e-4)

    file = torch.load(path, weights_only=True)
    plain = Toy()
    assert {k: v.shape for k, v in file["state_dict"].items()} == {k: v.shape for k, v in plain.state_dict().items()}
    moments = file["optimizer_states"][0]["state"]
    for index, parameter in enumerate(plain.parameters()):
        assert moments[index]["exp_avg"].shape == parameter.shape
    loaded = Toy.load_from_checkpoint(path, lr=0.5)
    assert loaded.hparams.lr == 0.5
    assert_close(dict(loaded.state_dict()), file["state_dict"], 0.0)


def test_checkpoint_of_ddp_is_read(pools: Pools, tmp_path: Path) -> None:
    expected = pools(2).run(_start, "ddp", str(tmp_path))[0]
    assert_close(pools(4).run(_resume, "tp2", str(tmp_path / "half.ckpt"))[0], expected, 1e-4)


def _use_weights_only(path: str) -> tuple[float, str]:
    run = trainer("tp2", max_epochs=3)
    loss = run.test(Toy(lr=9.0), loader(), ckpt_path=path, verbose=False)[0]["test_loss"]
    try:
        run.fit(Toy(), loader(), ckpt_path=path)
    except KeyError as error:
        return loss, str(error)
    return loss, ""


@pytest.mark.parametrize("form", ["tp2", "tp2 file"], ids=["directory", "file"])
def test_checkpoint_of_weights_only_can_be_tested_but_not_resumed(pools: Pools, tmp_path: Path, form: str) -> None:
    pools(4).run(_start, form, str(tmp_path))
    results = pools(4).run(_use_weights_only, str(tmp_path / "weights.ckpt"))
    assert len({loss for loss, _ in results}) == 1
    assert all("checkpoint contains only the model" in message for _, message in results)


# ----------------------------------------------------------------------------------------------------------------------


class _Hooked(Toy):
    """Leaves frozen weights out of its checkpoints, keeps a copy of a weight elsewhere, and notes what its hooks see."""

    strict_loading = False

    def __init__(self) -> None:
        super().__init__()
        self.net.head.requires_grad_(False)
        # Not cut, although its name ends like that of a weight which is.
        self.teacher = nn.ModuleDict({"net": nn.ModuleDict({"up": nn.Linear(8, 16)})})
        self.tied = nn.Linear(8, 16, bias=False)
        self.tied.weight = self.net.up.weight
        self.tp_plan = {"tied": "colwise"}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.saw = checkpoint["state_dict"]["net.up.weight"].shape
        checkpoint["copies"] = [{"mine.net.up.weight": self.net.up.weight.detach() + 1, "note": "text"}]
        for name in [name for name in checkpoint["state_dict"] if name.startswith("net.head")]:
            del checkpoint["state_dict"][name]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.loaded = checkpoint["copies"][0]["mine.net.up.weight"]
        assert checkpoint["state_dict"]["teacher.net.up.weight"].shape == (16, 8)


def _hooked(path: str, form: str) -> tuple[Any, ...]:
    run = trainer(form, max_epochs=1)
    run.fit(module := _Hooked(), loader())
    run.save_checkpoint(path)
    again = trainer("tp2", max_epochs=2)
    again.fit(other := _Hooked(), loader(), ckpt_path=path)
    assert other.tied.weight is other.net.up.weight and other.tied.weight.shape == (8, 8)
    return tuple(module.saw), tuple(other.loaded.shape), torch.equal(other.loaded, module.net.up.weight + 1)


@pytest.mark.parametrize("form", ["tp2", "tp2 file"], ids=["directory", "file"])
def test_hooks_see_parts_and_the_file_holds_whole_tensors(pools: Pools, tmp_path: Path, form: str) -> None:
    path = str(tmp_path / "hooked.ckpt")
    assert pools(4).run(_hooked, path, form) == [((8, 8), (8, 8), True)] * 4
    if form == "tp2":
        return
    file = torch.load(path, weights_only=True)
    assert not any(name.startswith("net.head") for name in file["state_dict"])
    for name in ("net.up.weight", "tied.weight", "teacher.net.up.weight"):
        assert file["state_dict"][name].shape == (16, 8), name
    assert torch.equal(file["state_dict"]["tied.weight"], file["state_dict"]["net.up.weight"])
    copied = file["copies"][0]
    assert copied["note"] == "text"
    assert torch.equal(copied["mine.net.up.weight"], file["state_dict"]["net.up.weight"] + 1)


class _DropsOnOneRank(Toy):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if dist.get_rank() == 1:
            del checkpoint["state_dict"]["net.up.weight"]


def _unequal_keys(path: str, form: str) -> str:
    run = trainer(form, max_steps=1)
    run.fit(_DropsOnOneRank(), loader())
    try:
        run.save_checkpoint(path)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("form", ["tp2", "tp2 file"], ids=["directory", "file"])
def test_hooks_that_differ_between_ranks_are_reported_instead_of_hanging(
    pools: Pools, tmp_path: Path, form: str
) -> None:
    messages = pools(4).run(_unequal_keys, str(tmp_path / "x.ckpt"), form)
    assert all("must add and remove the same keys on every rank" in message for message in messages)


class _Spy(Callback):
    """Notes with which flag the checkpoint is read."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        load = trainer.strategy.load_checkpoint
        self.flags: list[Any] = []

        def spied(path: Any, weights_only: Any = None) -> Any:
            self.flags.append(weights_only)
            return load(path, weights_only=weights_only)

        trainer.strategy.load_checkpoint = spied


def _flags(path: str) -> list[Any]:
    run = trainer("tp2", max_epochs=1)
    run.fit(Toy(), loader())
    run.save_checkpoint(path)
    spy = _Spy()
    trainer("tp2", max_epochs=2, callbacks=[spy]).fit(Toy(), loader(), ckpt_path=path, weights_only=True)
    return spy.flags


def test_weights_only_reaches_the_reader(pools: Pools, tmp_path: Path) -> None:
    assert pools(4).run(_flags, str(tmp_path / "x.ckpt")) == [[True]] * 4


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_precision_state_keeps_its_key(precision: str) -> None:
    from lightning.pytorch import Trainer

    options: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False, "precision": precision}
    import lightning_ted  # noqa: F401 - registers the strategy

    plain, ted = Trainer(**options).precision_plugin, Trainer(strategy="ted", **options).precision_plugin
    assert type(ted).__qualname__ == type(plain).__qualname__
    assert isinstance(ted, type(plain))


def _read_damaged(path: str) -> str:
    try:
        trainer("tp2").test(Toy(), loader(), ckpt_path=path, verbose=False)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kept", [0, 100, 3000])
def test_a_damaged_file_is_named(pools: Pools, tmp_path: Path, kept: int) -> None:
    path = tmp_path / "damaged.ckpt"
    torch.save({"state_dict": Toy().state_dict()}, path)
    path.write_bytes(path.read_bytes()[:kept])
    for message in pools(2).run(_read_damaged, str(path)):
        assert f"'{path}' cannot be read as a checkpoint" in message
