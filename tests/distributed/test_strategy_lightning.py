"""What Lightning promises of a run holds under the strategy: its command line, resuming anywhere, accumulation."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_ted import auxiliary_loss
from lightning_ted.cli import main
from tests.support.pool import Pools
from tests.support.runs import Numbered, Toy, assert_close, assert_same_everywhere, loader, trainer, whole_weights

CONFIG = """
seed_everything: 1
model:
  class_path: tests.distributed.test_strategy_lightning.ByCommand
  init_args: {path: PATH/weights}
optimizer:
  class_path: torch.optim.SGD
  init_args: {lr: 0.05, momentum: 0.9}
lr_scheduler:
  class_path: torch.optim.lr_scheduler.ExponentialLR
  init_args: {gamma: 0.1}
trainer:
  accelerator: cpu
  devices: 4
  max_epochs: 2
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: PATH
  strategy:
    class_path: lightning_ted.TEDStrategy
    init_args: {tensor_parallel_size: 2}
"""


class ByCommand(Toy):
    """Brings its data; optimizer and schedule come from the configuration, or are those of the configuration above."""

    configure_optimizers = None  # type: ignore[assignment]

    def __init__(self, path: str = "") -> None:
        super().__init__()
        self.path = path

    def train_dataloader(self) -> DataLoader:
        return loader()

    def on_train_end(self) -> None:
        if self.path:
            torch.save(whole_weights(self.trainer), f"{self.path}-{dist.get_rank()}")


class _ByHand(ByCommand):
    def configure_optimizers(self) -> Any:  # type: ignore[override]
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.1)]


def _by_command(config: str) -> None:
    sys.argv = ["lightning-ted", "fit", f"--config={config}"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()


def _by_hand() -> dict[str, Tensor]:
    seed_everything(1, verbose=False)
    run = trainer("tp2")
    run.fit(_ByHand())
    return whole_weights(run)


def test_optimizer_and_schedule_of_a_configuration_train(pools: Pools, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.replace("PATH", str(tmp_path)))
    pools(4).run(_by_command, str(config))
    expected = pools(4).run(_by_hand)[0]
    results = [torch.load(tmp_path / f"weights-{rank}") for rank in range(4)]
    assert_same_everywhere(results)
    assert_close(results[0], expected, 1e-6)


# ----------------------------------------------------------------------------------------------------------------------


def _resumed_in_mid_epoch(layout: str, folder: str) -> tuple[dict[str, Tensor], dict[str, list[list[int]]], int]:
    """Three of an epoch's four batches; then, from there, to the end of the second epoch."""
    first = trainer(layout, max_steps=3)
    first.fit(Toy(), loader(shuffle=True))
    first.save_checkpoint(path := f"{folder}/{layout}.ckpt")
    second = trainer(layout, max_epochs=2)
    second.fit(module := Toy(), loader(shuffle=True), ckpt_path=path, weights_only=False)
    return whole_weights(second), module.seen, second.global_step


def test_resuming_in_mid_epoch_equals_ddp(pools: Pools, tmp_path: Path) -> None:
    expected = pools(2).run(_resumed_in_mid_epoch, "ddp", str(tmp_path))
    results = pools(4).run(_resumed_in_mid_epoch, "tp2", str(tmp_path))
    assert_same_everywhere([weights for weights, *_ in results])
    assert_close(results[0][0], expected[0][0])
    assert [seen for _, seen, _ in results] == [expected[rank // 2][1] for rank in range(4)]
    assert {steps for *_, steps in results} == {expected[0][2]}


class _Stateful(DataLoader):
    """Goes on behind the batch at which its state was taken."""

    def __init__(self, rank: int, size: int) -> None:
        sampler = DistributedSampler(Numbered(), size, rank, shuffle=False)
        super().__init__(Numbered(), batch_size=4, sampler=sampler)
        self.position, self.start = 0, 0

    def __iter__(self) -> Any:
        self.position, self.start = self.start, 0
        for i, batch in enumerate(super().__iter__()):
            if i >= self.position:
                self.position = i + 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["position"] % len(self)


class _BringsLoader(Toy):
    def train_dataloader(self) -> DataLoader:
        strategy: Any = self.trainer.strategy
        return _Stateful(strategy.data_parallel_rank, strategy.data_parallel_size)


class _Saves(Callback):
    """In mid-epoch, behind the second batch."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)


def _stateful(path: str) -> tuple[dict[str, Tensor], dict[str, Tensor], Any, Any]:
    options: dict[str, Any] = {"use_distributed_sampler": False, "max_epochs": 2}
    whole = trainer("tp2", callbacks=[_Saves(path)], **options)
    whole.fit(uninterrupted := _BringsLoader())
    second = trainer("tp2", **options)
    second.fit(module := _BringsLoader(), ckpt_path=path, weights_only=False)
    return whole_weights(whole), whole_weights(second), uninterrupted.seen["train"][2:], module.seen["train"]


def test_a_loader_with_a_state_resumes_exactly(pools: Pools, tmp_path: Path) -> None:
    for whole, resumed, later, seen in pools(4).run(_stateful, str(tmp_path / "x.ckpt")):
        assert seen == later
        assert_same_everywhere([whole, resumed])


# ----------------------------------------------------------------------------------------------------------------------


class _WithAuxiliaryLoss(Toy):
    def __init__(self) -> None:
        super().__init__("sgd")
        self.net.moe.aux_loss_coef, self.net.moe.z_loss_coef = 0.3, 0.1

    def _loss(self, batch: Any) -> Tensor:
        return F.mse_loss(self.net(batch[0]), batch[1]) + auxiliary_loss(self)


def _accumulate(layout: str, batch: int) -> dict[str, Tensor]:
    run = trainer(layout, accumulate_grad_batches=2)
    batches = loader(batch)
    if layout == "one":  # the order that Lightning's distributed samplers shuffle into
        batches = loader(batch, sampler=DistributedSampler(Numbered(), 1, 0, shuffle=True))
    run.fit(_WithAuxiliaryLoss(), batches)
    return whole_weights(run)


@pytest.mark.parametrize(("layout", "batch"), [("tp2", 4), ("tp2 etp1", 4), ("ep4", 2)])
def test_auxiliary_losses_of_accumulated_batches_equal_one_process(pools: Pools, layout: str, batch: int) -> None:
    results = pools(4).run(_accumulate, layout, batch)
    assert_same_everywhere(results)
    assert_close(results[0], pools(1).run(_accumulate, "one", 8)[0])
