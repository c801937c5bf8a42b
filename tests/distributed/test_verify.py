"""Does ``verify`` pass what is right, and name what is wrong?"""

from __future__ import annotations

import json
import sys
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ted import MoESpec, TEDStrategy
from lightning_ted.cli import main
from lightning_ted.errors import LayoutError, VerificationError
from lightning_ted.verify import VerificationReport
from tests.support.blocks import SAID, Own
from tests.support.runs import FEATURES, Net

NORM = "replicated_with_grad_allreduce"


def batch(size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, FEATURES, generator=generator), torch.randn(size, 1, generator=generator)


class Module(L.LightningModule):
    def __init__(self, net: nn.Module, reduction: str = "mean") -> None:
        super().__init__()
        self.net, self.reduction = net, reduction

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.net(batch[0]), batch[1], reduction=self.reduction)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Normed(nn.Module):
    """Heads, of which each tensor rank has some, with a norm that all share."""

    def __init__(self, plan: dict[str, str]) -> None:
        super().__init__()
        self.tp_plan = {"up": "colwise", "down": "rowwise"} | plan
        self.up, self.norm, self.down = nn.Linear(FEATURES, 16), nn.LayerNorm(4), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x).unflatten(-1, (-1, 4))).flatten(-2))


class Batched(Net):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.extra = layer

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.extra(x))


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x)


def verify(
    net: nn.Module, tensor: int = 2, expert: int | str = "auto", reduction: str = "mean", **options: Any
) -> VerificationReport:
    torch.manual_seed(3)
    strategy = TEDStrategy(tensor_parallel_size=tensor, expert_parallel_size=expert)  # type: ignore[arg-type]
    return strategy.verify(Module(net, reduction), batch(), **options)


def test_what_is_right_passes_and_is_not_changed() -> None:
    net = Net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    report = verify(net, 2, 2, trainer_options={"gradient_clip_val": 0.01})
    assert report.ok, str(report)
    report.raise_if_wrong()
    assert report.layout.startswith("4 ranks = tensor 2 x data 2 = expert-tensor 2 x expert 2")
    assert {row.name for row in report.rows} == {f"net.{name}" for name in before}
    assert all(row.ok and row.gradient < 1e-5 and row.update is not None for row in report.rows)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert "equals one process" in str(report) and not torch.distributed.is_initialized()


def test_dropout_is_switched_off_and_told() -> None:
    report = verify(Batched(nn.Dropout(0.5)))
    assert report.ok, str(report)
    assert any("Dropout was switched off" in note and "net.extra" in note for note in report.notes)


def test_a_forgotten_norm_is_named() -> None:
    report = verify(Normed({}))
    wrong = {row.name: row.cause for row in report.rows if not row.ok}
    assert set(wrong) == {"net.norm.weight", "net.norm.bias"}
    assert all(NORM in cause for cause in wrong.values())
    assert "The plan forgets replicated parameters" in report.causes[0] and "net.norm" in report.causes[0]
    assert verify(Normed({"norm": NORM})).ok
    with pytest.raises(VerificationError, match="does NOT equal one process"):
        report.raise_if_wrong()


def test_an_output_that_is_another_is_named() -> None:
    class Squashed(Normed):
        def forward(self, x: Tensor) -> Tensor:
            up = self.up(x)
            return self.down(up / up.norm(dim=-1, keepdim=True))  # over this rank's features

    report = verify(Squashed({"norm": NORM}))
    assert not report.ok and report.module == "net.down"
    assert any("'net.down'" in cause for cause in report.causes)


def test_statistics_of_a_ranks_samples_are_named() -> None:
    report = verify(Batched(nn.BatchNorm1d(FEATURES)))
    assert not report.ok and any("sync_batchnorm=True" in cause and "net.extra" in cause for cause in report.causes)


def test_a_sum_over_samples_is_named() -> None:
    report = verify(Net(), reduction="sum")
    assert not report.ok
    assert any("The loss is a sum over this rank's samples" in cause for cause in report.causes)
    assert all(row.cause == "too small by the data degree 2" for row in report.rows if row.gradient > 1e-5)


def test_random_numbers_are_named() -> None:
    report = verify(Batched(Noise()))
    assert not report.ok and "draws random numbers" in report.causes[0]


class Late(Module):
    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.made = False

    def configure_model(self) -> None:
        if not self.made:
            torch.manual_seed(3)
            self.net, self.made = Net(), True


def test_layers_that_come_late_tell_the_degrees() -> None:
    report = TEDStrategy(tensor_parallel_size=2).verify(Late(), batch())
    assert report.ok, str(report)
    assert "expert 2" in report.layout


class Manual(Module):
    def __init__(self) -> None:
        super().__init__(Net())
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return {"loss": loss.detach(), "x": batch[0].sum(1)}


def test_manual_optimization_and_what_a_step_returns() -> None:
    report = TEDStrategy(expert_parallel_size=2).verify(Manual(), batch())
    assert report.ok and report.loss is not None and len(report.rows) == 11, str(report)


class Waiting(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.manual_backward(F.mse_loss(self.net(batch[0]), batch[1]))


class Poisoned(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return {
            "loss": loss,
            "x": loss.detach() * (float("nan") if self.trainer.world_size > 1 else 1),
            "n": torch.tensor(3),
        }


class Statistic(Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.register_buffer("mean", torch.zeros(FEATURES))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.mean.mul_(0.9).add_(0.1 * batch[0].mean(0))
        return super().training_step(batch, batch_idx)


def test_nothing_passes_unseen() -> None:
    strategy = TEDStrategy(tensor_parallel_size=2)
    with pytest.raises(VerificationError, match="No optimizer stepped in the first batch"):
        strategy.verify(Waiting(), batch())
    assert not strategy.verify(Poisoned(Net()), batch()).ok
    report = strategy.verify(Statistic(Net()), batch())
    assert not report.ok and [row.name for row in report.rows if not row.ok] == ["mean"]
    for options in ({"timeout": -5}, {"tolerance": 0}):
        with pytest.raises(VerificationError, match=next(iter(options))):
            strategy.verify(Module(Net()), batch(), **options)
    with pytest.raises(VerificationError, match="must be a LightningModule"):
        strategy.verify(Net(), batch())  # type: ignore[arg-type]


def test_blocks_of_ones_own_are_compared_with_what_they_were() -> None:
    module = Own("ListBlock")
    said = MoESpec(block="ListBlock", **SAID["ListBlock"])
    report = TEDStrategy(tensor_parallel_size=2, expert_parallel_size=2, moe_specs=[said]).verify(module, batch())
    assert report.ok, str(report)
    assert any("experts.3.w1.weight" in row.name for row in report.rows)
    assert isinstance(module.net["blocks"][0].experts, nn.ModuleList)  # as it was


def test_what_cannot_be_run_is_told() -> None:
    strategy = TEDStrategy(tensor_parallel_size=2)
    with pytest.raises(VerificationError, match="The batch of 7 samples cannot be split over 2 data ranks"):
        strategy.verify(Module(Net()), batch(7))
    with pytest.raises(VerificationError, match="is in 16 bits"):
        strategy.verify(Module(Net()).to(torch.bfloat16), batch())
    with pytest.raises(LayoutError, match="tensor_parallel_size=2"):
        strategy.verify(Module(Net()), batch(), processes=3)
    with pytest.raises(VerificationError, match="tolerance"):
        strategy.verify(Module(Net()), batch(), tolerance=0)

    class Broken(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise RuntimeError("no such thing")

    with pytest.raises(VerificationError, match="(?s)failed on rank . of 4.*no such thing"):
        strategy.verify(Broken(Net()), batch())

    class Hanging(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            while self.global_rank == 1:
                pass
            return super().training_step(batch, batch_idx)

    with pytest.raises(VerificationError, match="had not ended after 12 s"):
        strategy.verify(Hanging(Net()), batch(), timeout=12)


def test_a_plan_of_transformers_that_is_wrong_is_caught() -> None:
    pytest.importorskip("transformers")
    from tests.distributed.test_huggingface import Vision

    tokens = torch.randint(3, 64, (4, 8), generator=torch.Generator().manual_seed(1))
    report = TEDStrategy(tensor_parallel_size=2, expert_parallel_size=1).verify(Vision(), tokens)
    wrong = {row.name: row.cause for row in report.rows if not row.ok}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in wrong} == {"q_norm", "k_norm"} and len(wrong) == 4
    assert all(NORM in cause for cause in wrong.values()) and not report.ok


# -- the command -----------------------------------------------------------------------------------------------------------

SMALL = [
    "--model.config.num_layers=2",
    "--model.config.sequence_length=16",
    "--data.sequence_length=16",
    "--data.num_bytes=5000",
]


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str | int | None:
    monkeypatch.setattr(
        sys, "argv", ["lightning-ted", "verify", "--config", "configs/quickstart.yaml", *SMALL, *arguments]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


@pytest.mark.filterwarnings("ignore")  # Lightning's own, of its CLI
def test_a_configuration_is_verified(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "--samples", "2", "--json", "--ckpt_path", "x") == 0
    text = capsys.readouterr().out
    found = json.loads(text[text.index("{\n") :])
    assert found["ok"] and found["layout"].startswith("4 ranks = tensor 2 x data 2") and len(found["rows"]) > 20
    assert command(monkeypatch, "--samples", "2", "--tolerance", "1e-15", "--trainer.accelerator", "gpu") == 1
    assert "does NOT equal one process" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # Lightning's own, of its CLI
def test_configurations_that_cannot_be_verified_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "first batch has 16 samples, to be shared by 2 data ranks" in str(command(monkeypatch, "--samples", "3"))
    assert "no `trainer.strategy` of this package" in str(command(monkeypatch, "--trainer.strategy", "auto"))
