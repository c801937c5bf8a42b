"""Activation checkpointing through a Trainer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn

from lightning_ted import TEDStrategy
from lightning_ted.moe import MoE, auxiliary_loss
from lightning_ted.recompute import RecomputeOptions, checkpoint_blocks
from tests.support.pool import Pools
from tests.support.runs import FEATURES, Toy, loader, whole_weights

FULL = RecomputeOptions("full")


class Body(nn.Module):
    tp_plan = {"up": "colwise", "down": "rowwise"}

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(FEATURES, 16), nn.Linear(16, FEATURES)
        self.moe = MoE(FEATURES, 16, 4, aux_loss_coef=0.1)
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += torch.is_grad_enabled()
        x = x + self.down(torch.tanh(self.up(x)))
        return x + F.dropout(self.moe(x), 0.2, self.training)


class Deep(Toy):
    """Two equal blocks."""

    def __init__(self) -> None:
        super().__init__("sgd")
        torch.manual_seed(7)
        self.net = nn.Sequential(Body(), Body(), nn.Linear(FEATURES, 1))

    def _loss(self, batch: Any) -> Tensor:
        return super()._loss(batch) + auxiliary_loss(self)


class Manual(Deep):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        first = self._loss(batch)
        second = self._loss([batch[0].flip(0), batch[1].flip(0)])
        self.manual_backward(second)
        self.manual_backward(first)
        optimizer.step()
        optimizer.zero_grad()


class Skipping(Manual):
    """A forward that gets no backward, between two that do."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self._loss(batch)
        else:
            super().training_step(batch, batch_idx)


CASES: dict[str, tuple[type[Deep], dict[str, Any]]] = {
    "accumulated": (Deep, {"accumulate_grad_batches": 2}),
    "manual": (Manual, {}),
    "skipped": (Skipping, {}),
    "clipped, validated within, averaged": (Deep, {"gradient_clip_val": 0.1, "val_check_interval": 2}),
}


def fit(module: Deep, case: str, **arguments: Any) -> tuple[dict[str, Tensor], list[int]]:
    options = dict(CASES[case][1])
    if "averaged" in case:
        options["callbacks"] = [WeightAveraging()]
    run = L.Trainer(
        strategy=TEDStrategy(tensor_parallel_size=2, **arguments),
        accelerator="cpu",
        devices=2,
        max_epochs=1,
        limit_train_batches=4,
        limit_val_batches=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    torch.manual_seed(11)
    run.fit(module, loader(), loader())
    return whole_weights(run), [block.runs for block in module.net[:2]]


def cases(**arguments: Any) -> dict[str, tuple[dict[str, Tensor], list[int]]]:
    return {case: fit(CASES[case][0](), case, **arguments) for case in CASES}


def modes() -> list[dict[str, tuple[dict[str, Tensor], list[int]]]]:
    return [
        cases(),
        cases(activation_checkpointing="full"),
        cases(activation_checkpointing="comm_aware", comm_aware_policy="all_to_all", activation_checkpointing_policy=["Body"]),
    ]  # fmt: skip


def test_training_ends_in_the_same_weights(pools: Pools) -> None:
    for none, *others in pools(2).run(modes):
        for each in others:
            for case, (weights, runs) in each.items():
                assert all(torch.equal(weights[name], tensor) for name, tensor in none[case][0].items()), case
                assert min(runs) > max(none[case][1]), case


def left_behind() -> tuple[type, list[int]]:
    """What a block is after a fit, and how often it runs under a strategy that knows nothing of this."""
    module = Deep()
    fit(module, "manual", activation_checkpointing="full")
    for block in module.net[:2]:
        block.runs = 0
    loss = module._loss(next(iter(loader())))
    loss.backward()
    return type(module.net[0]), [block.runs for block in module.net[:2]]


def test_a_strategy_takes_its_checkpointing_with_it(pools: Pools) -> None:
    assert pools(2).run(left_behind) == [(Body, [1, 1])] * 2


def other_ways() -> tuple[list[str], bool]:
    """A module that goes on with another way of sending tokens."""
    module, seen = Deep(), []
    for options in ({}, {"moe_overlap_chunks": 2}, {"moe_dispatcher": "hierarchical"}):
        fit(module, "accumulated", **options)
        axes = module.net[0].moe.axes
        seen.append(f"{axes.dispatcher} {axes.overlap_chunks}")
    return seen, module.net[0].moe._dispatcher[0] is axes


def test_a_module_may_be_fitted_again_with_tokens_sent_in_another_way(pools: Pools) -> None:
    assert pools(2).run(other_ways) == [(["all_to_all 1", "all_to_all 2", "hierarchical 1"], True)] * 2


def refits() -> tuple[list[list[int]], str]:
    module, seen = Deep(), []
    for mode in ("comm_aware", "full", None):
        for block in module.net[:2]:
            block.runs = 0
        seen.append(fit(module, "clipped, validated within, averaged", activation_checkpointing=mode)[1])
    return seen, type(module.net[0]).__mro__[1].__name__


def test_a_module_may_be_fitted_again_in_another_mode(pools: Pools) -> None:
    for seen, after in pools(2).run(refits):
        assert seen == [[8, 8], [8, 8], [4, 4]]
        assert after == "Module"


# LightningCLI calls methods that jsonargparse has renamed since.
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_a_configuration_file_names_the_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "ted.yaml"
    file.write_text(
        """
trainer:
  accelerator: cpu
  devices: 1
  logger: false
  strategy:
    class_path: lightning_ted.TEDStrategy
    init_args:
      activation_checkpointing: comm_aware
      activation_checkpointing_policy: [Body, tests.distributed.test_recompute_training.Body]
      comm_aware_policy: all_to_all
"""
    )
    monkeypatch.setattr(sys, "argv", ["fit.py", "--config", str(file)])
    cli = LightningCLI(Deep, run=False, save_config_callback=None, seed_everything_default=False)
    assert isinstance(cli.trainer.strategy, TEDStrategy)
    assert cli.trainer.strategy._recompute == RecomputeOptions("comm_aware", "all_to_all")
    assert checkpoint_blocks(cli.model, FULL, cli.trainer.strategy._recomputed_blocks) == ["net.0", "net.1"]
