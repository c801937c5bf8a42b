"""Gradients: summed once, clipped by the one norm, accumulated; equal to DDP's on as many data-parallel ranks."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from lightning_ted.collectives.primitives import all_reduce
from lightning_ted.collectives.recorder import CommRecorder
from lightning_ted.collectives.whole import gather_whole
from lightning_ted.errors import UnsupportedError
from tests.support.pool import Pools
from tests.support.runs import Numbered, Toy, assert_close, assert_same_everywhere, loader, trainer, whole_weights

#: Batch size that makes a global batch of eight: whatever the layout, a step then sees the same samples.
BATCH = {"ddp": 4, "tp2": 4, "tp2 etp1": 4, "ep4": 2, "tp4": 8}


def _fit(layout: str, options: dict[str, Any], optimizer: str = "sgd") -> dict[str, torch.Tensor]:
    run = trainer(layout, **options)
    run.fit(Toy(optimizer), loader(BATCH[layout]))
    return whole_weights(run)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_clip_val": 0.05},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 3},
        {"overfit_batches": 2},
    ],
    ids=["plain", "clip norm", "clip value", "accumulate", "overfit"],
)
def test_fit_equals_ddp(pools: Pools, options: dict[str, Any]) -> None:
    expected = pools(2).run(_fit, "ddp", options)[0]
    for layout in ("tp2", "tp2 etp1"):
        results = pools(4).run(_fit, layout, options)
        assert_same_everywhere(results)
        assert_close(results[0], expected)


@pytest.mark.parametrize("layout", ["ep4", "tp4"])
def test_every_layout_clips_by_the_same_norm(pools: Pools, layout: str) -> None:
    options = {"gradient_clip_val": 0.05}
    results = pools(4).run(_fit, layout, options)
    assert_same_everywhere(results)
    assert_close(results[0], pools(2).run(_fit, "ddp", options)[0])


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "bf16-true"])
def test_precisions_train(pools: Pools, precision: str) -> None:
    tolerance = {"64-true": 1e-9, "bf16-mixed": 2e-2, "bf16-true": 8e-2}[precision]
    options: dict[str, Any] = {"precision": precision, "gradient_clip_val": 0.05, "max_epochs": 1}
    results = pools(4).run(_fit, "tp2", options)
    assert_same_everywhere(results)
    assert_close(results[0], pools(2).run(_fit, "ddp", options)[0], tolerance)


def _one_step(layout: str, batch: int, accumulate: int) -> dict[str, torch.Tensor]:
    run = trainer(layout, max_steps=1, accumulate_grad_batches=accumulate)
    run.fit(Toy("sgd"), loader(batch))
    return whole_weights(run)


@pytest.mark.parametrize("layout", ["tp2", "tp2 etp1", "ep4"])
def test_accumulated_step_moves_every_parameter_like_one_large_batch(pools: Pools, layout: str) -> None:
    before = Toy().state_dict()
    large = BATCH[layout]
    accumulated = pools(4).run(_one_step, layout, large // 2, 2)
    assert_same_everywhere(accumulated)
    for name, tensor in accumulated[0].items():
        assert not torch.equal(tensor, before[name]), f"{name} has not moved"
    assert_close(accumulated[0], pools(4).run(_one_step, layout, large, 1)[0], 1e-6)


def _router_of(layout: str) -> torch.Tensor:
    run = trainer(layout, gradient_clip_val=0.05)
    run.fit(module := Toy("sgd"), loader(BATCH[layout]))
    return module.net.moe.router.weight.detach().clone()


@pytest.mark.parametrize("layout", ["tp2", "tp4", "tp2 etp1"])
def test_router_stays_equal_on_tensor_peers(pools: Pools, layout: str) -> None:
    first, *others = pools(4).run(_router_of, layout)
    for other in others:
        assert torch.equal(first, other)


# ----------------------------------------------------------------------------------------------------------------------


class _OneOptimizerHasOneParameter(Toy):
    """Manual optimization with two optimizers, one of them of a single replicated parameter."""

    def __init__(self) -> None:
        super().__init__("sgd")
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        bias = self.net.head.bias
        rest = [p for p in self.parameters() if p is not bias]
        return torch.optim.SGD(rest, lr=0.02), torch.optim.Adam([bias], lr=0.02)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        with first.toggle_model():
            first.zero_grad()
            self.manual_backward(self._loss(batch))
            self.clip_gradients(first, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
            first.step()
        with second.toggle_model():
            second.zero_grad()
            self.manual_backward(self._loss(batch))
            self.clip_gradients(second, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
            second.step()


class _AccumulatesByHand(Toy):
    """Two losses, one after the other, into the same gradients, over two batches; once with and once without blocking."""

    def __init__(self, block: bool) -> None:
        super().__init__("sgd")
        self.automatic_optimization = False
        self.block = block

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        last = batch_idx % 2 == 1
        with optimizer.toggle_model(sync_grad=last or not self.block):
            self.manual_backward(self._loss(batch))
            self.manual_backward(self._loss(batch).sqrt())
        if last:
            optimizer.step()
            optimizer.zero_grad()


def _fit_manual(layout: str, kind: str) -> tuple[dict[str, torch.Tensor], int]:
    # Parameters that are switched off look unused to DDP.
    run = trainer("ddp unused" if layout == "ddp" and kind == "two" else layout)
    module = _OneOptimizerHasOneParameter() if kind == "two" else _AccumulatesByHand(kind == "blocked")
    run.fit(module, loader())
    return whole_weights(run), run.global_step


@pytest.mark.parametrize("kind", ["two", "unblocked", "blocked"])
@pytest.mark.parametrize("layout", ["tp2", "tp2 etp1"])
def test_manual_optimization_equals_ddp(pools: Pools, layout: str, kind: str) -> None:
    expected, steps = pools(2).run(_fit_manual, "ddp", kind)[0]
    results = pools(4).run(_fit_manual, layout, kind)
    assert {result[1] for result in results} == {steps}
    assert_same_everywhere([result[0] for result in results])
    assert_close(results[0][0], expected)


class _BypassesTheStrategy(Toy):
    def __init__(self, how: str) -> None:
        super().__init__("sgd")
        self.automatic_optimization = False
        self.how = how

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        if self.how == "backward":
            self._loss(batch).backward()
        else:
            with optimizer.toggle_model(sync_grad=False):
                self.manual_backward(self._loss(batch))
        optimizer.step()


def _fit_bypassing(how: str) -> str:
    try:
        trainer("tp2").fit(_BypassesTheStrategy(how), loader())
    except UnsupportedError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("how", ["backward", "blocked"])
def test_gradients_that_were_not_averaged_are_not_stepped(pools: Pools, how: str) -> None:
    for message in pools(2).run(_fit_bypassing, how):
        assert "whose gradients have not been averaged" in message and "self.manual_backward(loss)" in message


def _gradient_calls(accumulate: int) -> dict[Any, int]:
    class Counting(Toy):
        def on_fit_start(self) -> None:
            self.recorder = CommRecorder()
            self.trainer.strategy.mesh.ledger.recorder = self.recorder

    run = trainer("tp2", accumulate_grad_batches=accumulate, max_epochs=1)
    run.fit(module := Counting("sgd"), loader())
    return {key: calls for key, calls in module.recorder.calls.items() if key == ("reduce_scatter", "data")}


def test_accumulation_sums_gradients_once(pools: Pools) -> None:
    # Four batches per rank: steps after 1, 2, 3 and 4, or after 3 and 4.
    every = pools(4).run(_gradient_calls, 1)[0][("reduce_scatter", "data")]
    third = pools(4).run(_gradient_calls, 3)[0][("reduce_scatter", "data")]
    assert third * 2 == every


# ----------------------------------------------------------------------------------------------------------------------


class _HalfFrozen(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.net.up.requires_grad_(False)
        self.net.moe.experts.down_proj.requires_grad_(False)
        self.unused = torch.nn.Linear(2, 2)


def _fit_frozen(layout: str) -> tuple[dict[str, torch.Tensor], bool]:
    run = trainer(layout)
    run.fit(module := _HalfFrozen(), loader())
    return whole_weights(run), module.net.up.weight.grad is None and module.unused.weight.grad is None


def test_frozen_and_unused_parameters_keep_their_values(pools: Pools) -> None:
    before = _HalfFrozen().state_dict()
    results = pools(4).run(_fit_frozen, "tp2")
    assert all(no_grad for _, no_grad in results)
    for name in ("net.up.weight", "net.moe.experts.down_proj", "unused.weight"):
        assert torch.equal(results[0][0][name], before[name]), name
    assert not torch.equal(results[0][0]["net.down.weight"], before["net.down.weight"])
    assert results[0][0].keys() == before.keys()


class _ClipsItself(Toy):
    def configure_gradient_clipping(self, optimizer: Any, **options: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")


def _overridden_clipping() -> tuple[list[str], dict[str, torch.Tensor]]:
    run = trainer("tp2", max_epochs=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(_ClipsItself("sgd"), loader())
    return [str(w.message) for w in caught], whole_weights(run)


def test_overridden_gradient_clipping_is_warned_of(pools: Pools) -> None:
    messages, weights = pools(4).run(_overridden_clipping)[0]
    assert any(
        "_ClipsItself.configure_gradient_clipping` is overridden" in m and "clip_gradients" in m for m in messages
    )
    assert_close(weights, pools(2).run(_fit, "ddp", {"gradient_clip_val": 0.05, "max_epochs": 1})[0])


class _OwnBackward(Toy):
    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        (2 * loss).backward(*args, **kwargs)

    def on_after_backward(self) -> None:
        strategy = self.trainer.strategy
        self.slices = {name: p.grad.clone() for name, p in self.named_parameters() if "experts" not in name}
        self.whole = {name: strategy.full_gradient(name) for name, _ in self.named_parameters()}
        self.norm = strategy.grad_norm(self.optimizers()).item()


def _own_backward() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], float, list[int]]:
    run = trainer("tp2", max_steps=1)
    run.fit(module := _OwnBackward("sgd"), loader())
    axis = run.strategy.mesh.axis("data")
    summed = {name: all_reduce(part, axis) for name, part in module.slices.items() if "router" not in name}
    for name, part in summed.items():
        summed[name] = gather_whole(part, run.strategy.layouts[name], run.strategy.mesh)
    return summed, module.whole, module.norm, module.seen["train"][0]


def test_module_may_override_backward_and_sees_reduced_slices_and_whole_gradients_after_it(pools: Pools) -> None:
    results = pools(4).run(_own_backward)
    summed, whole, norm, _ = results[0]
    assert_same_everywhere([result[1] for result in results])
    assert_close(summed, {name: whole[name] for name in summed}, 1e-7)
    module = Toy("sgd")
    (2 * module._loss(Numbered()[results[0][3] + results[2][3]])).backward()
    assert_close(whole, {name: p.grad for name, p in module.named_parameters()}, 1e-6)  # type: ignore[misc]
    assert norm == pytest.approx(torch.nn.utils.get_total_norm([p.grad for p in module.parameters()]).item(), rel=1e-6)


class _SkipsOnOneRank(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        return None


def _skip() -> str:
    try:
        trainer("tp2", max_steps=1).fit(_SkipsOnOneRank("sgd"), loader())
    except RuntimeError as error:
        return str(error)
    return ""


def test_skipping_a_training_step_is_refused_as_under_ddp(pools: Pools) -> None:
    assert all("Skipping the `training_step`" in text for text in pools(4).run(_skip))
