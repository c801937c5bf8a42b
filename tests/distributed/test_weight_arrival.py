"""Weights that arrive while the next forward runs are there when they are read."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_ted.errors import UnsupportedError
from lightning_ted.optim.shared_bucket import SharedBucket
from tests.support.pool import Pools
from tests.support.runs import FEATURES, Toy, assert_same_everywhere, loader, trainer, whole_weights


class _Borrowing(nn.Module):
    """Reads the weight of a child that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.child.weight)


class _Module(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.borrowing = _Borrowing()
        self.own = nn.Linear(FEATURES, FEATURES, bias=False)

    def _loss(self, batch: Any) -> Tensor:
        # The own layer is read in `training_step`, which is no forward.
        x = nn.functional.linear(batch[0], self.own.weight) + self.borrowing(batch[0])
        return nn.functional.mse_loss(self.net(x), batch[1])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        buckets = [b for b in self.trainer.strategy._training.bucket_of.values() if isinstance(b, SharedBucket)]
        self.seen_on_the_way = getattr(self, "seen_on_the_way", 0) + sum(b._gathering is not None for b in buckets)


def _fit(overlap: bool, precision: str, stage: int) -> tuple[dict[str, Tensor], int, dict[str, Tensor]]:
    run = trainer("tp2", precision=precision, max_epochs=2, gradient_clip_val=0.1)
    kind = type(run.strategy._training_options)
    run.strategy._training_options = kind(overlap_weights=overlap, zero_stage=stage, tile_size=64)
    run.fit(module := _Module(), loader(), loader())
    hooks = sum(len(each._forward_pre_hooks) for each in module.modules())
    tested = run.test(module, loader(), verbose=False)[0]
    weights = whole_weights(run)
    assert overlap == (module.seen_on_the_way > 0)
    return weights, hooks, {name: torch.tensor(value) for name, value in tested.items()}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("stage", [1, 2])
def test_overlap_changes_no_bit(pools: Pools, precision: str, stage: int) -> None:
    plain = pools(4).run(_fit, False, precision, stage)
    late = pools(4).run(_fit, True, precision, stage)
    assert_same_everywhere([weights for weights, *_ in plain + late])
    assert_same_everywhere([tested for *_, tested in plain + late])
    # Nothing is left behind by a run that has ended.
    assert len({hooks for _, hooks, _ in plain + late}) == 1


def _average() -> str:
    run = trainer("tp2", callbacks=[L.pytorch.callbacks.StochasticWeightAveraging(0.1)])
    run.strategy._training_options = type(run.strategy._training_options)(overlap_weights=True)
    try:
        run.fit(Toy(), loader())
    except UnsupportedError as error:
        return str(error)
    return ""


def test_averaging_weights_on_their_way_is_refused_by_name(pools: Pools) -> None:
    for message in pools(2).run(_average):
        assert "`StochasticWeightAveraging`" in message and "`overlap_weight_gather`" in message


class _SharesAParameter(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD([self.net.head.weight], lr=0.1)]


def _share() -> str:
    try:
        trainer("tp2").fit(_SharesAParameter(), loader())
    except UnsupportedError as error:
        return str(error)
    return ""


def test_a_parameter_of_two_optimizers_is_refused_by_name(pools: Pools) -> None:
    assert all("'net.head.weight' is held by two optimizers" in text for text in pools(2).run(_share))
