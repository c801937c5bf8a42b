"""16-bit weights to compute with, 32-bit ones to step; and one decision of all ranks whether there was an overflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from lightning_ted.errors import UnsupportedError
from tests.support.pool import Pools
from tests.support.runs import Toy, assert_close, assert_same_everywhere, loader, trainer, whole_weights

DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def _trainer(precision: str, layout: str = "tp2", **options: Any) -> L.Trainer:
    if precision == "16-mixed":
        # Asked for by name, Lightning would take bf16 on a CPU.
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        return trainer(layout, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], **options)
    return trainer(layout, precision=precision, **options)


class _Looks(L.Callback):
    """Compares working weights and masters after every step."""

    def __init__(self) -> None:
        self.dtypes: set[tuple[torch.dtype, torch.dtype]] = set()
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        share = trainer.optimizers[0].sharded
        for name, parameter in pl_module.named_parameters():
            master = share.gather_master(parameter)
            assert torch.equal(master.to(parameter.dtype), parameter), name
            assert parameter.grad is None or parameter.grad.dtype == parameter.dtype, name
            self.dtypes.add((parameter.dtype, master.dtype))
        self.weights.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})


def _fit(precision: str, stage: int) -> tuple[list[Any], dict[str, Tensor], set[torch.dtype]]:
    look = _Looks()
    run = _trainer(precision, callbacks=[look], max_epochs=1, gradient_clip_val=0.1)
    run.strategy._training_options = run.strategy._training_options.__class__(zero_stage=stage, tile_size=50)
    run.fit(module := Toy("sgd"), loader())
    return list(look.dtypes), whole_weights(run), {p.dtype for p in module.parameters()}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("precision", DTYPES)
def test_working_weights_are_the_cast_masters_and_the_module_is_given_back_in_32_bits(
    pools: Pools, precision: str, stage: int
) -> None:
    results = pools(4).run(_fit, precision, stage)
    assert_same_everywhere([weights for _, weights, _ in results])
    for dtypes, _, after in results:
        assert dtypes == [(DTYPES[precision], torch.float32)]
        assert after == {torch.float32}
    assert_close(results[0][1], pools(2).run(_fit_ddp)[0], 1e-2)


def _fit_ddp() -> dict[str, Tensor]:
    run = trainer("ddp", max_epochs=1, gradient_clip_val=0.1)
    run.fit(Toy("sgd"), loader())
    return whole_weights(run)


class _Overflows(Toy):
    """On one rank, in one step."""

    def __init__(self) -> None:
        super().__init__()
        self.scales: list[float] = []
        self.states: list[list[Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        assert loss is not None
        return loss * float("inf") if batch_idx == 1 and self.global_rank == 1 else loss

    def on_train_batch_end(self, *args: Any) -> None:
        scaler = self.trainer.precision_plugin.scaler
        self.scales.append(scaler.get_scale())
        state = self.trainer.optimizers[0].state_dict()["state"]
        tensors = [value for entries in state.values() for value in entries.values()]
        self.states.append([tensor.clone() for tensor in [*tensors, *self.parameters()]])


def _overflow(stage: int) -> tuple[list[float], bool, bool, dict[str, Tensor]]:
    run = _trainer("16-mixed", max_epochs=1, gradient_clip_val=0.1)
    run.strategy._training_options = run.strategy._training_options.__class__(zero_stage=stage)
    run.fit(module := _Overflows(), loader())
    first, second, third, *_ = module.states
    untouched = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    moved = not all(torch.equal(a, b) for a, b in zip(second, third, strict=True))
    return module.scales, untouched, moved, whole_weights(run)


@pytest.mark.parametrize("stage", [1, 2])
def test_overflow_on_one_rank_skips_the_step_on_all(pools: Pools, stage: int) -> None:
    results = pools(4).run(_overflow, stage)
    assert_same_everywhere([result[3] for result in results])
    for scales, untouched, moved, weights in results:
        assert scales == [2.0**10, 2.0**9, 2.0**9, 2.0**9]
        assert untouched and moved
        assert all(tensor.isfinite().all() for tensor in weights.values())


def _resume(
    precision: str, folder: str
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]], set[torch.dtype], list[str]]:
    """Uninterrupted, resumed from a directory and from a file; and what the file holds."""
    whole = _trainer(precision, max_epochs=2)
    whole.fit(Toy(), loader())
    first = _trainer(precision, max_epochs=1)
    first.fit(Toy(), loader())
    resumed = []
    for form in ("directory", "file"):
        first.strategy._save_distributed = form == "directory"
        first.save_checkpoint(f"{folder}/{form}")
    for form in ("directory", "file"):
        second = _trainer(precision, layout="tp2", max_epochs=2)
        second.fit(Toy(), loader(), ckpt_path=f"{folder}/{form}")
        resumed.append(whole_weights(second))
    saved = torch.load(f"{folder}/file", weights_only=True)
    moments = saved["optimizer_states"][0]["state"]
    dtypes = {tensor.dtype for tensor in saved["state_dict"].values()}
    dtypes |= {entry.dtype for entries in moments.values() for entry in entries.values()}
    return whole_weights(whole), resumed, dtypes, sorted(map(str, moments))


@pytest.mark.parametrize("precision", DTYPES)
def test_checkpoint_holds_masters_and_resuming_is_exact(pools: Pools, precision: str, tmp_path: Path) -> None:
    for whole, resumed, dtypes, indices in pools(4).run(_resume, precision, str(tmp_path)):
        assert dtypes == {torch.float32}
        assert len(indices) == len(whole)
        assert_same_everywhere([whole, *resumed])


def _gradient_dtypes(wide: bool) -> tuple[set[torch.dtype], float]:
    class _Seen(Toy):
        def on_after_backward(self) -> None:
            self.dtypes = {p.grad.dtype for p in self.parameters()}  # type: ignore[union-attr]

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.norm = self.trainer.strategy.grad_norm(optimizer).item()

    run = trainer("tp2", precision="bf16-mixed", max_steps=1, accumulate_grad_batches=2)
    run.strategy._training_options = run.strategy._training_options.__class__(wide_gradients=wide)
    run.fit(module := _Seen(), loader())
    return module.dtypes, module.norm


@pytest.mark.parametrize("wide", [True, False])
def test_gradients_are_accumulated_in_the_dtype_that_was_asked_for(pools: Pools, wide: bool) -> None:
    for dtypes, norm in pools(4).run(_gradient_dtypes, wide):
        assert dtypes == {torch.float32 if wide else torch.bfloat16}
        assert norm > 0


class _Unfreezes(Toy):
    def __init__(self, hook: str) -> None:
        super().__init__("sgd")
        self.hook = hook
        self.net.down.requires_grad_(False)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.hook == "on_train_batch_start" and batch_idx == 1:
            self.net.down.requires_grad_(True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        if self.hook == "training_step" and batch_idx == 1:
            self.net.down.requires_grad_(True)
        return super().training_step(batch, batch_idx)


def _unfreeze(hook: str, precision: str) -> tuple[str, dict[str, Tensor]]:
    run = _trainer(precision, max_epochs=1)
    try:
        run.fit(_Unfreezes(hook), loader())
    except UnsupportedError as error:
        return str(error), {}
    return "", whole_weights(run)


def test_weights_that_are_unfrozen_in_a_hook_get_masters_and_in_a_step_are_refused(pools: Pools) -> None:
    results = pools(4).run(_unfreeze, "on_train_batch_start", "bf16-mixed")
    assert_same_everywhere([weights for _, weights in results])
    expected = pools(4).run(_unfreeze, "training_step", "32-true")[0][1]
    assert not torch.equal(expected["net.down.weight"], Toy().net.down.weight)
    assert_close(results[0][1], expected, 1e-2)
    for message, _ in pools(4).run(_unfreeze, "training_step", "bf16-mixed"):
        assert "'net.down.weight' has been unfrozen" in message or "'net.down.bias'" in message
        assert "`on_train_batch_start`" in message


def _average() -> str:
    try:
        _trainer("bf16-mixed", callbacks=[L.pytorch.callbacks.StochasticWeightAveraging(0.1)]).fit(Toy(), loader())
    except UnsupportedError as error:
        return str(error)
    return ""


def test_averaging_16_bit_weights_is_refused_by_name(pools: Pools) -> None:
    assert all("`StochasticWeightAveraging`" in text and "'32-true'" in text for text in pools(2).run(_average))


class _ChangesByHand(Toy):
    def __init__(self, how: str) -> None:
        super().__init__("sgd", lr=1e-9)
        self.how = how

    def on_fit_start(self) -> None:
        if self.how == "on_fit_start":
            torch.nn.init.constant_(self.net.head.weight, 3.0)

    def on_train_start(self) -> None:
        if self.how == "on_train_start":
            self.load_state_dict(self.state_dict() | {"net.head.weight": torch.full((1, 8), 3.0)})

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        weight = self.net.head.weight
        if batch_idx != 1:
            return
        if self.how == "replaced":
            weight.data = torch.full_like(weight, 3.0)
        elif self.how == "in place":
            with torch.no_grad():
                weight.fill_(3.0)
        elif self.how == "data":
            weight.data.fill_(3.0)
            self.trainer.strategy.update_masters()


def _change(how: str) -> Tensor:
    run = _trainer("bf16-mixed", max_epochs=1)
    run.fit(_ChangesByHand(how), loader())
    return whole_weights(run)["net.head.weight"]


@pytest.mark.parametrize("how", ["replaced", "in place", "data", "on_fit_start", "on_train_start"])
def test_weights_that_are_changed_by_hand_stay_changed(pools: Pools, how: str) -> None:
    for weight in pools(4).run(_change, how):
        torch.testing.assert_close(weight, torch.full_like(weight, 3.0))


class _Normalises(Toy):
    """Layers on inputs that autocast leaves in fp32."""

    def __init__(self) -> None:
        super().__init__("sgd")
        self.norms = torch.nn.ModuleList([torch.nn.LayerNorm(8), torch.nn.GroupNorm(2, 8), torch.nn.BatchNorm1d(8)])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0]
        for norm in self.norms:
            x = norm(x.float())
        return torch.nn.functional.mse_loss(self.net(x), batch[1])


def _normalise() -> set[torch.dtype]:
    run = _trainer("bf16-mixed", max_steps=2)
    seen: set[torch.dtype] = set()

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            seen.update(p.dtype for p in pl_module.norms.parameters())
            assert pl_module.net.head.weight.dtype == torch.bfloat16

    run.callbacks.append(Look())
    run.fit(_Normalises(), loader())
    return seen


def test_normalisation_keeps_weights_in_32_bits(pools: Pools) -> None:
    assert pools(2).run(_normalise) == [{torch.float32}] * 2
