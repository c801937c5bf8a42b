"""A run goes on from a converted checkpoint: under one process from a directory, under TED from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_ted.convert import convert
from tests.support.pool import Pools
from tests.support.runs import Numbered, Toy, assert_close, loader, trainer, whole_weights


class _Groups(Toy):
    """Its groups hold parameters in another order than the module, and it has a schedule."""

    def configure_optimizers(self) -> Any:
        biases = [parameter for parameter in self.parameters() if parameter.dim() < 2]
        matrices = [parameter for parameter in self.parameters() if parameter.dim() >= 2]
        groups = [{"params": biases, "weight_decay": 0.0}, {"params": matrices}]
        optimizer = torch.optim.AdamW(groups, lr=self.hparams.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class _Averages(Callback):
    """Keeps averages of weights, of this rank's parts of them."""

    def __init__(self) -> None:
        self.averages: dict[str, Tensor] = {}

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        for name, parameter in pl_module.named_parameters():
            self.averages[name] = (self.averages.get(name, 0.0) + parameter.detach()) / 2

    def state_dict(self) -> dict[str, Any]:
        return {"averages": self.averages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.averages = dict(state_dict["averages"])


def _batches(layout: str) -> DataLoader:
    if layout == "one":  # the order that Lightning's distributed samplers shuffle into
        return loader(8, sampler=DistributedSampler(Numbered(), num_replicas=1, rank=0, shuffle=True, seed=0))
    return loader(8)


def _train(layout: str, path: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two epochs of four, with a checkpoint behind them; what one averages and ends in when it is not interrupted."""
    half = trainer(layout, max_epochs=2, callbacks=[_Averages()])
    half.fit(_Groups(), _batches(layout))
    half.save_checkpoint(path)
    return _end(layout, None)


def _end(layout: str, path: str | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    averages = _Averages()
    run = trainer(layout, max_epochs=4, callbacks=[averages])
    run.fit(_Groups(), _batches(layout), ckpt_path=path, weights_only=True)
    return whole_weights(run), averages.averages


def _loaded(path: str) -> dict[str, Tensor]:
    return dict(_Groups.load_from_checkpoint(path, weights_only=True).state_dict())


@pytest.mark.parametrize("form", ["tp2", "tp2 file"], ids=["directory", "file"])
def test_a_run_goes_on_from_a_converted_checkpoint(pools: Pools, tmp_path: Path, form: str) -> None:
    source, out = tmp_path / "half", tmp_path / "out"
    trained = pools(2).run(_train, form, str(source))
    weights = trained[0][0]
    convert(str(source), str(out), to="directory" if "file" in form else "file")
    for rank, (got, averages) in enumerate(pools(2).run(_end, "tp2", str(out))):
        assert all(torch.equal(got[name], weights[name]) for name in weights)
        assert all(torch.equal(averages[name], trained[rank][1][name]) for name in averages)
    if "file" in form:
        # In another layout, and back to where it came from.
        convert(str(out), str(tmp_path / "back"), to="file")
        assert_close(pools(2).run(_end, "tp2 etp1", str(out))[0][0], weights, 1e-4)
        out = tmp_path / "back"
    got, averages = pools(1).run(_end, "one", str(out))[0]
    assert_close(got, weights, 1e-4)
    assert averages["net.up.weight"].shape == (16, 8)
    saved = torch.load(out, weights_only=True)["state_dict"]
    assert_close(pools(1).run(_loaded, str(out))[0], dict(saved), 0.0)


def _test_loss(layout: str, path: str) -> float:
    return trainer(layout).test(_Groups(), loader(8), ckpt_path=path, verbose=False)[0]["test_loss"]


def test_weights_are_tested_with_after_a_round_trip_through_safetensors(pools: Pools, tmp_path: Path) -> None:
    source = tmp_path / "half"
    pools(2).run(_train, "tp2", str(source))
    convert(str(source), str(tmp_path / "hf"), to="safetensors", max_shard_size="1KB")
    convert(str(tmp_path / "hf"), str(tmp_path / "back"))
    convert(str(tmp_path / "hf"), str(tmp_path / "back.ckpt"))
    expected = pools(2).run(_test_loss, "tp2", str(source))[0]
    for path in ("back", "back.ckpt"):
        assert pools(2).run(_test_loss, "tp2", str(tmp_path / path)) == [expected] * 2
    assert pools(1).run(_test_loss, "one", str(tmp_path / "back.ckpt"))[0] == pytest.approx(expected, rel=1e-5)
