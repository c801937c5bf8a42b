"""Which optimizers may step which parameters: those made early do, those of others and of mixed elements are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_ted.errors import UnsupportedError
from tests.support.pool import Pools
from tests.support.runs import Toy, assert_close, assert_same_everywhere, loader, trainer, whole_weights


class _OptimizerFromOutside(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.outside: Any = None

    def setup(self, stage: str) -> None:
        # As a conversion does that cannot keep the parameter.
        if not isinstance(self.net.head.bias, nn.Parameter) or self.net.head.bias.grad is None:
            self.net.head.bias = nn.Parameter(self.net.head.bias.detach().clone())

    def configure_optimizers(self) -> Any:
        return self.outside


def _outside(kind: str) -> Any:
    run = trainer("tp2", max_epochs=1)
    if kind == "stranger":
        module: Toy = _OptimizerFromOutside()
        module.outside = torch.optim.SGD([*module.parameters(), nn.Parameter(torch.ones(3))], lr=0.02)  # type: ignore[assignment]
    elif kind == "early":
        module = _OptimizerFromOutside()
        module.outside = torch.optim.SGD(module.parameters(), lr=0.02, momentum=0.9)  # type: ignore[assignment]
    else:
        module = _OptimizerFromOutside()
        module.outside = torch.optim.LBFGS(module.parameters())  # type: ignore[assignment]
    try:
        run.fit(module, loader())
    except UnsupportedError as error:
        return str(error)
    return whole_weights(run)


def _ordinary() -> dict[str, torch.Tensor]:
    run = trainer("tp2", max_epochs=1)
    run.fit(Toy("sgd"), loader())
    return whole_weights(run)


def test_optimizer_made_before_the_run_steps_the_parts(pools: Pools) -> None:
    results = pools(4).run(_outside, "early")
    assert_same_everywhere(results)
    assert_close(results[0], pools(4).run(_ordinary)[0], 1e-6)


def test_optimizer_of_foreign_parameters_is_refused(pools: Pools) -> None:
    assert all("parameter of shape (3,)" in text and "HINT" in text for text in pools(4).run(_outside, "stranger"))


class _MakesParameterLate(Toy):
    def __init__(self, hook: str) -> None:
        super().__init__("sgd")
        self.hook = hook

    def configure_optimizers(self) -> Any:
        if self.hook == "configure_optimizers":
            self.late = nn.Parameter(torch.ones(8))
        return super().configure_optimizers()

    def on_train_start(self) -> None:
        if self.hook == "on_train_start":
            self.late = nn.Parameter(torch.ones(8))
            self.trainer.optimizers[0].add_param_group({"params": [self.late]})


def _late_parameter(hook: str) -> str:
    try:
        trainer("tp2", max_steps=1).fit(_MakesParameterLate(hook), loader())
    except UnsupportedError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("hook", ["configure_optimizers", "on_train_start"])
def test_a_parameter_that_would_not_be_averaged_is_refused_by_name(pools: Pools, hook: str) -> None:
    assert all(
        "of shape (8,) that was made after" in text and "`setup`" in text
        for text in pools(2).run(_late_parameter, hook)
    )


def _sparse() -> str:
    module = Toy("sgd")
    module.table = nn.Embedding(40, 8, sparse=True)
    try:
        trainer("tp2", max_steps=1).fit(module, loader())
    except UnsupportedError as error:
        return str(error)
    return ""


def test_sparse_gradients_are_refused_before_training(pools: Pools) -> None:
    assert all("'table'" in text and "`sparse=False`" in text for text in pools(2).run(_sparse))


def test_optimizer_that_mixes_elements_is_refused_by_name(pools: Pools) -> None:
    assert all("`LBFGS` cannot be used" in text and "closure" in text for text in pools(4).run(_outside, "lbfgs"))


class _ClipsForeign(Toy):
    def __init__(self) -> None:
        super().__init__("sgd")
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        foreign = torch.nn.Parameter(torch.ones(3))
        foreign.sum().backward()
        optimizer = torch.optim.SGD([foreign], lr=0.1)
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")


def _clip_foreign() -> str:
    try:
        trainer("tp2", max_steps=1).fit(_ClipsForeign(), loader())
    except UnsupportedError as error:
        return str(error)
    return ""


def test_clipping_a_parameter_that_is_not_averaged_is_refused(pools: Pools) -> None:
    assert all("This `SGD` is not one of those" in text for text in pools(2).run(_clip_foreign))
