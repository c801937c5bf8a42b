"""Directories under ``ModelCheckpoint``, written while training goes on, and read by models that have changed."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor, nn

from lightning_ted.checkpoint import distributed
from lightning_ted.checkpoint.directory import MANIFEST, Manifest
from lightning_ted.checkpoint.distributed import Source
from lightning_ted.errors import CheckpointError, UnsupportedError
from tests.support.pool import Pools
from tests.support.runs import Toy, assert_close, assert_same_everywhere, loader, trainer, whole_weights

LAYOUT = "tp2"


def _fit(
    path: str | None = None, module: L.LightningModule | None = None, background: bool = False, **options: Any
) -> L.Trainer:
    run = trainer(LAYOUT, **{"max_epochs": 2, **options})
    run.strategy._async_save = background
    run.fit(module or Toy(), loader(), loader(), ckpt_path=path)
    return run


def _names(folder: str | Path) -> list[str]:
    return sorted(os.listdir(folder))


# -- ModelCheckpoint ------------------------------------------------------------------------------------------------------


def _kept(folder: str, background: bool) -> tuple[list[str], list[str], dict[str, Tensor], dict[str, Tensor]]:
    """The best two of five by a metric, the last, and every second step."""
    best = ModelCheckpoint(f"{folder}/best", "{epoch}", "val_loss", save_top_k=2, save_last=True)
    often = ModelCheckpoint(f"{folder}/often", "{step}", every_n_train_steps=2, save_top_k=-1, save_weights_only=True)
    run = _fit(background=background, max_epochs=5, callbacks=[best, often], enable_checkpointing=True)
    last = trainer(LAYOUT, max_epochs=5, callbacks=[best], enable_checkpointing=True)
    last.fit(Toy(), loader(), ckpt_path="last")
    run.test(ckpt_path="best", dataloaders=loader(), verbose=False)
    return _names(f"{folder}/best"), _names(f"{folder}/often"), whole_weights(run), whole_weights(last)


@pytest.mark.parametrize("background", [False, True], ids=["at once", "background"])
def test_model_checkpoint_keeps_what_it_is_asked_to(pools: Pools, tmp_path: Path, background: bool) -> None:
    results = pools(4).run(_kept, str(tmp_path), background)
    best, often, *_ = results[0]
    assert len(best) == 3 and "last.ckpt" in best
    assert often == sorted(f"step={step}.ckpt" for step in range(2, 21, 2))
    assert all((tmp_path / "best" / name / MANIFEST).exists() for name in best)
    for name in often:
        assert not (tmp_path / "often" / name / "training").exists()
    manifest = Manifest.read(tmp_path / "best" / "last.ckpt")
    assert manifest.info["global_step"] == 20 and manifest.info["layout"]["tensor"] == 2
    manifest.check(tmp_path / "best" / "last.ckpt")
    assert_same_everywhere([last for *_, last in results])


def _linked(folder: str) -> None:
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1, save_last="link")
    _fit(background=True, max_epochs=1, callbacks=[saver], enable_checkpointing=True)


def test_a_link_to_the_last_checkpoint_is_made_before_that_is_there(pools: Pools, tmp_path: Path) -> None:
    pools(4).run(_linked, str(tmp_path / "new" / "folder"))
    last = tmp_path / "new" / "folder" / "last.ckpt"
    assert last.is_symlink() and last.resolve().name == "step=4.ckpt"
    Manifest.read(last).check(last)


def _hpc(folder: str) -> int:
    run = _fit(default_root_dir=folder)
    run.save_checkpoint(f"{folder}/hpc_ckpt_1.ckpt")
    again = trainer(LAYOUT, max_epochs=3, default_root_dir=folder)
    again.fit(Toy(), loader(), ckpt_path="hpc")
    return again.global_step


def test_checkpoints_of_clusters_are_found(pools: Pools, tmp_path: Path) -> None:
    assert pools(4).run(_hpc, str(tmp_path)) == [12] * 4


# -- the last whole one ----------------------------------------------------------------------------------------------------


class _Behind(Callback):
    """Notes with how many steps training begins."""

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self.steps = trainer.global_step


def _last(folder: str) -> tuple[int, str]:
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1, save_last=True)
    behind = _Behind()
    run = trainer(LAYOUT, max_epochs=3, callbacks=[saver, behind], enable_checkpointing=True)
    try:
        # As when it is called by a script: the launcher has seen what the user asked for.
        run.strategy._before_launch(module := Toy(), (module, "last"))
        run.fit(module, loader(), ckpt_path="last")
    except CheckpointError as error:
        return -1, str(error)
    return behind.steps, ""


def _save_often(folder: str) -> None:
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1, save_last=True)
    _fit(max_epochs=1, callbacks=[saver], enable_checkpointing=True)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


@pytest.mark.filterwarnings("ignore:.*passes over a checkpoint")
def test_a_damaged_last_checkpoint_is_passed_over(pools: Pools, tmp_path: Path) -> None:
    folder, damaged = tmp_path / "whole", tmp_path / "damaged"
    pools(4).run(_save_often, str(folder))
    assert _names(folder) == ["last.ckpt", "step=2.ckpt", "step=4.ckpt"]
    shutil.copytree(folder, damaged)
    assert pools(4).run(_last, str(folder)) == [(4, "")] * 4
    _flip(next((damaged / "last.ckpt" / "model").glob("*.distcp")))
    _flip(next((damaged / "step=4.ckpt" / "training").glob("*.distcp")))
    assert pools(4).run(_last, str(damaged)) == [(2, "")] * 4
    shutil.rmtree(damaged / "last.ckpt")
    torch.save({"weights": torch.zeros(2)}, damaged / "last.ckpt")  # of something else
    assert pools(4).run(_last, str(damaged)) == [(12, "")] * 4  # where that run has ended


def test_a_last_checkpoint_that_was_never_completed_is_passed_over(pools: Pools, tmp_path: Path) -> None:
    pools(4).run(_save_often, str(tmp_path))
    shutil.rmtree(tmp_path / "last.ckpt")
    (tmp_path / "last.ckpt").symlink_to("step=6.ckpt")  # as `save_last="link"` makes it
    assert pools(4).run(_last, str(tmp_path)) == [(4, "")] * 4


def test_without_a_whole_checkpoint_nothing_is_begun_anew(pools: Pools, tmp_path: Path) -> None:
    pools(4).run(_save_often, str(tmp_path))
    for path in tmp_path.iterdir():
        (path / "state.pt").unlink()
    for steps, message in pools(4).run(_last, str(tmp_path)):
        assert steps == -1
        assert "finds no whole checkpoint" in message and "last.ckpt/state.pt' cannot be read" in message


DAMAGES = {
    "truncated": lambda folder: _cut(next((folder / "training").glob("*.distcp"))),
    "changed": lambda folder: _flip(next((folder / "model").glob("*.distcp"))),
    "index": lambda folder: _flip(folder / "model" / ".metadata"),
    "missing": lambda folder: (folder / "ranks.pt").unlink(),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "manifest": lambda folder: _flip(folder / MANIFEST),
}


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _read(path: str) -> str:
    try:
        _fit(path)
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_damaged_checkpoint_is_refused_by_name(pools: Pools, tmp_path: Path) -> None:
    for name, damage in DAMAGES.items():
        pools(2).run(_write, str(tmp_path / name))
        damage(tmp_path / name)
        for message in pools(2).run(_read, str(tmp_path / name)):
            assert f"'{tmp_path / name}" in message, name
    for message in pools(2).run(_read, str(tmp_path / "nowhere")):
        assert message == f"There is no checkpoint '{tmp_path}/nowhere'."


def _write(path: str) -> None:
    _fit(max_steps=1).save_checkpoint(path)


# -- in the background ----------------------------------------------------------------------------------------------------


class _Slow:
    """Holds a save until training has gone on."""

    def __init__(self) -> None:
        self.may_go = threading.Event()
        self.write = distributed.write

    def __call__(self, *args: Any) -> None:
        assert self.may_go.wait(60)
        self.write(*args)


class _GoesOn(Callback):
    def __init__(self, path: str, slow: _Slow) -> None:
        self.path, self.slow = path, slow
        self.while_writing = 0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 4:
            trainer.save_checkpoint(self.path)
        if 4 < trainer.global_step < 8:
            self.while_writing += not os.path.exists(self.path)
        if trainer.global_step == 8:
            self.slow.may_go.set()


def _background(path: str) -> tuple[int, dict[str, Tensor], dict[str, Tensor]]:
    slow = _Slow()
    distributed.write = slow
    try:
        run = _fit(background=True, callbacks=[goes_on := _GoesOn(path, slow)])
    finally:
        distributed.write = slow.write
    assert os.path.exists(path)  # the end of training has waited
    return goes_on.while_writing, whole_weights(run), whole_weights(_fit(path))


def test_training_goes_on_while_its_past_is_written(pools: Pools, tmp_path: Path) -> None:
    for while_writing, whole, resumed in pools(4).run(_background, str(tmp_path / "x")):
        assert while_writing == 3
        assert_same_everywhere([whole, resumed])


def _fails(folder: str) -> tuple[str, str, list[str]]:
    run = _fit()
    run.strategy._async_save, run.state.status = True, TrainerStatus.RUNNING
    run.save_checkpoint(f"{folder}/good")
    run.strategy._saver.wait()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    finish = distributed._finish
    distributed._finish = full  # type: ignore[assignment]
    run.save_checkpoint(f"{folder}/bad")
    run.strategy.remove_checkpoint(f"{folder}/good")
    messages = []
    try:
        run.save_checkpoint(f"{folder}/next")
    except CheckpointError as error:
        messages.append(str(error))
    run.save_checkpoint(f"{folder}/worse")
    try:
        run.fit(Toy(), loader(), ckpt_path=f"{folder}/good")
    except CheckpointError as error:
        messages.append(str(error))
    distributed._finish = finish
    return messages[0], messages[1], _names(folder)


def test_a_failure_in_the_background_is_raised_by_the_next_save(pools: Pools, tmp_path: Path) -> None:
    for first, second, names in pools(2).run(_fails, str(tmp_path)):
        assert "/bad' could not be written" in first and "No space left on device" in first
        assert "/worse' could not be written" in second
        assert names == ["good"]  # what a failed one was to replace is kept


class _Ends(Callback):
    """Saves in the background and ends the run."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.path)
        raise RuntimeError("ended")


def _at_once(folder: str) -> tuple[bool, ...]:
    with contextlib.suppress(RuntimeError):
        _fit(background=True, callbacks=[_Ends(f"{folder}/ended")])
    ended = os.path.exists(f"{folder}/ended")  # before anybody ends the process
    run = _fit(background=True)
    run.save_checkpoint(f"{folder}/behind")
    behind = run.strategy._saver._pending is None and os.path.exists(f"{folder}/behind")
    run.state.status = TrainerStatus.RUNNING
    run.save_checkpoint(f"{folder}/hpc_ckpt_1.ckpt")
    return ended, behind, run.strategy._saver._pending is None


def test_what_may_be_the_last_thing_that_a_process_does_is_not_done_in_the_background(
    pools: Pools, tmp_path: Path
) -> None:
    assert pools(2).run(_at_once, str(tmp_path)) == [(True, True, True)] * 2


def _tested_only(folder: str) -> int:
    run = trainer("tp2", callbacks=[OnExceptionCheckpoint(folder)], enable_checkpointing=True)
    run.test(Toy(), loader(), verbose=False)  # it removes a checkpoint on the first rank
    dist.all_reduce(count := torch.ones(()))
    return int(count)


def test_removing_a_checkpoint_waits_for_nobody(pools: Pools, tmp_path: Path) -> None:
    assert pools(2).run(_tested_only, str(tmp_path)) == [2, 2]


def _at_home(folder: str) -> tuple[bool, int]:
    os.environ["HOME"] = folder
    run = _fit(max_epochs=1)
    run.save_checkpoint("~/x.ckpt")
    again = trainer(LAYOUT, max_epochs=2)
    again.fit(Toy(), loader(), ckpt_path=f"file://{folder}/x.ckpt")
    return os.path.isdir(f"{folder}/x.ckpt"), again.global_step - run.global_step


def test_paths_are_taken_as_under_other_strategies(pools: Pools, tmp_path: Path) -> None:
    assert pools(4).run(_at_home, str(tmp_path)) == [(True, 4)] * 4


# -- other models ----------------------------------------------------------------------------------------------------------


class _Grown(Toy):
    """Has one more layer, of which the checkpoint knows nothing, and a frozen one."""

    strict_loading = False

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(1, 1)
        self.net.head.requires_grad_(False)

    def _loss(self, batch: Any) -> Tensor:
        return self.extra(super()._loss(batch).view(1)).square().sum()


class _Shrunk(Toy):
    strict_loading = False


class _Strict(_Grown):
    strict_loading = True


class _Wider(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.net.up, self.net.down = nn.Linear(8, 32), nn.Linear(32, 8)


def _changed(path: str) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    first = _fit()
    first.save_checkpoint(path)
    first.strategy._save_distributed = False
    first.save_checkpoint(f"{path} file")
    before = whole_weights(first)
    grown = trainer(LAYOUT, max_epochs=3, limit_train_batches=1)
    messages = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        grown.fit(_Grown(), loader(), ckpt_path=path)
    told = any("steps other parameters: 2 are new, such as 'extra.bias'" in str(warning.message) for warning in caught)
    assert told == grown.is_global_zero
    frozen = {name: w for name, w in whole_weights(grown).items() if "head" in name}
    grown.save_checkpoint(f"{path} grown")
    shrunk = trainer(LAYOUT, max_epochs=4, limit_train_batches=1)
    shrunk.fit(_Shrunk(), loader(), ckpt_path=f"{path} grown")
    shrunk.save_checkpoint(f"{path} shrunk")
    stepped = Source(Path(f"{path} shrunk"), shrunk.strategy.mesh.host_group()).state["optimizer_states"][0]["state"]
    assert stepped.keys() == dict(shrunk.lightning_module.named_parameters()).keys()
    for kind, form in ((_Strict, path), (_Wider, path), (_Wider, f"{path} file")):
        try:
            _fit(form, kind())
        except (CheckpointError, RuntimeError) as error:
            messages.append(str(error))
    return before, frozen, messages


def test_models_that_have_changed(pools: Pools, tmp_path: Path) -> None:
    for before, frozen, messages in pools(4).run(_changed, str(tmp_path / "x")):
        assert all(torch.equal(before[name], weight) for name, weight in frozen.items())
        assert 'Missing key(s) in state_dict: "extra.weight", "extra.bias"' in messages[0]
        for message in messages[1:]:  # also where half of the layer is as large as the whole one was
            assert "'net.up.weight' is of shape [16, 8] in the checkpoint, and of [32, 8] in _Wider" in message


class _Renames(Toy):
    """Was saved when a layer had another name."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        weights = checkpoint["state_dict"]
        for name in [name for name in weights if name.startswith("net.ascend.")]:
            weights[name.replace("ascend", "up")] = weights.pop(name)


class _Ascends(Toy):
    def __init__(self) -> None:
        super().__init__()
        up = self.net.up
        del self.net.up
        self.net.ascend = up
        self.net.tp_plan = {"ascend": "colwise", "down": "rowwise"}
        self.net.forward = self._forward

    def _forward(self, x: Tensor) -> Tensor:
        net = self.net
        x = x + net.down(torch.tanh(net.ascend(x)))
        return net.head(x + net.moe(x))


def _renamed(path: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    first = _fit(module=_Ascends())
    first.save_checkpoint(path, weights_only=True)
    second = trainer(LAYOUT)
    second.test(_Renames(), loader(), ckpt_path=path, verbose=False)
    return {name.replace("ascend", "up"): w for name, w in whole_weights(first).items()}, whole_weights(second)


def test_a_hook_may_rename_what_the_model_does_not_know(pools: Pools, tmp_path: Path) -> None:
    for before, after in pools(4).run(_renamed, str(tmp_path / "x")):
        assert_close(dict(sorted(after.items())), dict(sorted(before.items())), 0.0)


class _Keeps(Callback):
    """Keeps weights of its own in all sorts of ways."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        named = {name: p.detach().clone() for name, p in module.named_parameters()}
        self.kept = {"shadow": list(named.values()), "tuple": (1, {"averages": named}), "named": named}

    def state_dict(self) -> dict[str, Any]:
        return self.kept

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.kept = state_dict


def _kept_by_a_callback(layout: str, path: str, written: str | None) -> dict[str, list[Tensor]]:
    run = trainer(layout, max_epochs=1, callbacks=[keeps := _Keeps()])
    run.fit(Toy(), loader(), ckpt_path=written)
    if written is None:
        run.save_checkpoint(path)
        run.strategy._save_distributed = False
        run.save_checkpoint(f"{path} file")
    assert type(keeps.kept["tuple"]) is tuple and keeps.kept["tuple"][0] == 1
    found = {"shadow": keeps.kept["shadow"], "named": list(keeps.kept["named"].values())}
    return found | {"tuple": list(keeps.kept["tuple"][1]["averages"].values())}


@pytest.mark.parametrize("form", ["", " file"], ids=["directory", "file"])
def test_weights_that_a_callback_keeps_are_found_by_name_or_order(pools: Pools, tmp_path: Path, form: str) -> None:
    path = str(tmp_path / "x")
    written = pools(4).run(_kept_by_a_callback, "tp2", path, None)
    for before, after in zip(written, pools(4).run(_kept_by_a_callback, "tp2", path, f"{path}{form}"), strict=True):
        for how in before:
            assert all(map(torch.equal, before[how], after[how])), how
    for found in pools(4).run(_kept_by_a_callback, "ep4", path, f"{path}{form}"):  # in another layout
        assert found["shadow"][0].shape == (16, 8)
        for how in ("shadow", "tuple"):
            assert all(map(torch.equal, found[how], found["named"])), how


class _KeepsNumbered(_Keeps):
    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self.kept = {"numbered": {i: p.detach().clone() for i, p in enumerate(module.parameters())}}


def _numbered(path: str) -> bool:
    run = _fit(max_epochs=1, callbacks=[_KeepsNumbered()])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.save_checkpoint(path)
    text = "numbered.0' has the shape of this rank's part of a parameter, and no name"
    return any(text in str(warning.message) for warning in caught) == run.is_global_zero


def test_parts_of_weights_without_a_name_are_told(pools: Pools, tmp_path: Path) -> None:
    assert all(pools(2).run(_numbered, str(tmp_path / "x")))


# -- what is refused -------------------------------------------------------------------------------------------------------


class _Object:
    pass


class _Remembers(Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"object": _Object()}


def _objects(path: str) -> tuple[str, int]:
    _fit(callbacks=[_Remembers()]).save_checkpoint(path)
    message = ""
    try:
        _fit(path)
    except CheckpointError as error:
        message = str(error)
    run = trainer(LAYOUT, max_epochs=3)
    run.fit(Toy(), loader(), ckpt_path=path, weights_only=False)
    return message, run.global_step


def test_what_could_execute_code_is_read_only_if_trusted(pools: Pools, tmp_path: Path) -> None:
    for message, steps in pools(2).run(_objects, str(tmp_path / "x")):
        assert (
            f"'{tmp_path}/x/state.pt' holds more than tensors and plain data: " in message
            and "weights_only=False" in message
        )
        assert steps == 24


def _foreign(path: str, data: Any) -> str:
    if dist.get_rank() == 0:
        Path(path).write_text(data) if isinstance(data, str) else torch.save(data, path)
    dist.barrier()
    try:
        _fit(path)
    except CheckpointError as error:
        return str(error)
    return "nothing"


LIGHTNINGS = {"state_dict": {}, "pytorch-lightning_version": "2.6.6"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.ones(2), "is no checkpoint of Lightning: it holds no `state_dict`"),
        ([1], "is no checkpoint of Lightning: it holds no `state_dict`"),
        ({"state_dict": {}}, "does not tell which version has written it"),
        ({**LIGHTNINGS, "lightning_ted": "oops"}, "its entry 'lightning_ted' is not what this package writes"),
        ({"state_dict": {"order": 1, "aliases": 1, "others": 1, "versions": 1}}, "is a part of a checkpoint"),
        ({**LIGHTNINGS, "hyper_parameters": _Object()}, "holds more than tensors and plain data: "),
        ("text", "cannot be read as a checkpoint"),
    ],
)
def test_foreign_files_are_refused_by_name(pools: Pools, tmp_path: Path, data: Any, message: str) -> None:
    for found in pools(2).run(_foreign, str(tmp_path / "x.ckpt"), data):
        assert f"'{tmp_path}/x.ckpt'" in found and message in found


def _elsewhere() -> list[str]:
    run, messages = _fit(max_steps=1), []
    for path, options in (("memory://x", {}), ("x", {"storage_options": {"a": 1}})):
        try:
            run.save_checkpoint(path, **options)
        except UnsupportedError as error:
            messages.append(str(error))
    return messages


def test_directories_elsewhere_are_refused_by_name(pools: Pools) -> None:
    for messages in pools(2).run(_elsewhere):
        assert "'memory://x' is no path of a local or shared file system" in messages[0]
        assert "`storage_options={'a': 1}`" in messages[1]


class _Nested(Callback):
    """Keeps the plain data of another checkpoint's directory."""

    def state_dict(self) -> dict[str, Any]:
        return {"other": {"lightning_ted.tensor": "callbacks.x", "parameter": "x"}}


def _nested(path: str) -> str:
    run = _fit(max_steps=1, callbacks=[_Nested()])
    with pytest.raises(CheckpointError) as error:
        run.save_checkpoint(path)
    return str(error.value)


def test_parts_of_other_checkpoints_are_not_saved_as_plain_data(pools: Pools, tmp_path: Path) -> None:
    for message in pools(2).run(_nested, str(tmp_path / "x")):
        assert "A part of another checkpoint, with 'callbacks.x' in it" in message
    assert not list(tmp_path.iterdir())
