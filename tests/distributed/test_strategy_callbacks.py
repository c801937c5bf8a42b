"""Lightning's callbacks see this rank's parts, and give the numbers that they give under DDP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    Callback,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DistributedSampler

from lightning_ted import MoE
from lightning_ted.callbacks import ExpertBiasBalancing
from lightning_ted.errors import TEDError, UnsupportedError
from tests.support.pool import Pools
from tests.support.runs import (
    FEATURES,
    Numbered,
    Toy,
    assert_close,
    assert_same_everywhere,
    loader,
    trainer,
    whole_weights,
)


class _Unfreezes(BaseFinetuning):
    """Trains the head only, and the experts too from the second epoch on, with a learning rate of their own."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze([pl_module.net.up, pl_module.net.down, pl_module.net.moe])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net.moe, optimizer, lr=0.01)


class _FinetunedToy(Toy):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.02, momentum=0.9)


def _callbacks(kind: str) -> list[Callback]:
    if kind == "ema":
        return [EMAWeightAveraging(decay=0.8)]
    if kind == "swa":
        return [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2, annealing_epochs=1)]
    return [_Unfreezes()]


def _module(kind: str) -> Toy:
    return _FinetunedToy("sgd") if kind == "finetuning" else Toy("sgd")


def _fit(layout: str, kind: str, folder: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Four epochs; and two of three, resumed until four."""
    whole = trainer(layout, max_epochs=4, callbacks=_callbacks(kind))
    batches = loader()
    if layout == "one":  # the order that Lightning's distributed samplers shuffle into
        batches = loader(8, sampler=DistributedSampler(Numbered(), 1, 0, shuffle=True))
    whole.fit(_module(kind), batches, loader())
    saver = ModelCheckpoint(folder, f"{layout} {kind} {{epoch}}", every_n_epochs=2, save_on_train_epoch_end=True)
    first = trainer(layout, max_epochs=3, callbacks=[*_callbacks(kind), saver], enable_checkpointing=True)
    first.fit(_module(kind), batches, loader())
    second = trainer(layout, max_epochs=4, callbacks=_callbacks(kind))
    second.fit(_module(kind), batches, loader(), ckpt_path=saver.best_model_path, weights_only=False)
    return whole_weights(whole), whole_weights(second)


@pytest.mark.parametrize("kind", ["ema", "swa", "finetuning"])
def test_callback_equals_one_process_also_when_resumed(pools: Pools, kind: str, tmp_path: Path) -> None:
    results = pools(4).run(_fit, "tp2", kind, str(tmp_path))
    expected, resumed = pools(1).run(_fit, "one", kind, str(tmp_path))[0]
    assert_same_everywhere([result[0] for result in results])
    assert_close(results[0][0], expected)
    assert_close(results[0][1], resumed)
    if kind == "ema":  # the others do not restore everything, in one process neither
        assert_same_everywhere(list(results[0]))


class _Schedules(Toy):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=8)
        return [optimizer], [{"scheduler": cycle, "interval": "step"}]


class _Plateau(Toy):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=10.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


def _learning_rates(layout: str, kind: str, folder: str) -> tuple[list[str], list[float]]:
    monitor = LearningRateMonitor("step")
    rates: list[float] = []

    class Records(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    logger = CSVLogger(folder) if torch.distributed.get_rank() == 0 else True
    run = trainer(layout, logger=logger, default_root_dir=folder, callbacks=[monitor, Records()])
    run.fit(_Schedules() if kind == "cycle" else _Plateau(), loader(), loader())
    return sorted(monitor.lrs), rates


@pytest.mark.parametrize("kind", ["cycle", "plateau"])
def test_schedules_and_their_monitor_equal_ddp(pools: Pools, kind: str, tmp_path: Path) -> None:
    expected = pools(2).run(_learning_rates, "ddp", kind, str(tmp_path))[0]
    for result in pools(4).run(_learning_rates, "tp2", kind, str(tmp_path)):
        assert result == expected
    assert expected[0] == ["lr-AdamW"] and len(set(expected[1])) > 1


class _MakesLayersLate(Toy):
    def __init__(self) -> None:
        super().__init__()
        del self.net

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            torch.manual_seed(7)
            self.net = Toy().net


def _early_copy(kind: str) -> str:
    run = trainer("tp2", callbacks=_callbacks(kind), max_steps=1)
    try:
        run.fit(_MakesLayersLate(), loader())
    except UnsupportedError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_averaging_of_layers_that_are_made_late_is_refused(pools: Pools, kind: str) -> None:
    assert all("Build the layers in `_MakesLayersLate.__init__`" in text for text in pools(4).run(_early_copy, kind))


def _timed() -> int:
    run = trainer(
        "tp2", max_epochs=-1, max_time={"seconds": 1}, callbacks=[Timer({"seconds": 1 + torch.distributed.get_rank()})]
    )
    run.fit(Toy(), loader())
    return run.global_step


def test_time_limit_stops_all_ranks_at_the_same_step(pools: Pools) -> None:
    assert len(set(pools(4).run(_timed))) == 1


# -- balancing -------------------------------------------------------------------------------------------------------------


class _Skewed(Toy):
    """Begins with a router that prefers one expert."""

    def __init__(self) -> None:
        super().__init__("sgd", lr=0.0)
        self.net.moe = MoE(FEATURES, 16, 4, top_k=1, score="sigmoid", aux_loss_coef=0.0, correction_bias=True)
        with torch.no_grad():
            self.net.moe.router.weight[2] += self.net.moe.router.weight.abs().sum() * torch.ones(FEATURES)


def _balanced(layout: str, batch_size: int, accumulate: int) -> tuple[Tensor, float, float]:
    module = _Skewed()
    options = {"max_epochs": 20, "accumulate_grad_batches": accumulate, "callbacks": [ExpertBiasBalancing(0.02)]}
    run = trainer(layout, **options)
    run.fit(module, loader(batch_size))
    before, after = _Skewed(), module
    loads = []
    for one in (before, after):
        layer = one.net.moe
        router = layer.router
        chosen = router(Numbered().x.to(router.weight.dtype)).expert_TK.reshape(-1)
        loads.append(float(chosen.bincount(minlength=4).max()) / 8)
    return after.net.moe.router.e_score_correction_bias.clone(), *loads


def test_biases_even_out_the_load_of_all_ranks(pools: Pools) -> None:
    (want, before, after), *_ = pools(1).run(_balanced, "one", 32, 1)
    assert before > 2 and after < 0.8 * before
    for layout, batch_size, accumulate in (("tp2 ep2", 16, 1), ("ep4", 8, 1), ("ep4", 4, 2)):
        for got, *_ in pools(4).run(_balanced, layout, batch_size, accumulate):
            assert torch.equal(got, want), layout


def _without_a_bias() -> str:
    try:
        trainer("tp2", callbacks=[ExpertBiasBalancing()]).fit(Toy(), loader())
    except TEDError as error:
        return str(error)
    return ""


def test_a_model_without_biases_is_refused(pools: Pools) -> None:
    assert all("finds no router with a score-correction bias in Toy" in text for text in pools(2).run(_without_a_bias))
