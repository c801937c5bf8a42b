"""Whole Trainer runs on the ranks of a pool, and what is compared of them."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_ted import TEDStrategy
from lightning_ted.checkpoint.single_file import SingleFile
from lightning_ted.checkpoint.tree import Names
from lightning_ted.moe import MoE

SAMPLES, FEATURES = 32, 8


class Numbered(Dataset):
    """Samples that know their number."""

    def __init__(self, length: int = SAMPLES) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(length, FEATURES, generator=generator)
        self.y = torch.randn(length, 1, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, int]:
        return self.x[i], self.y[i], i


class Net(nn.Module):
    """A dense block, cut by its plan, and a MoE layer. No auxiliary losses: under DDP, theirs are of the local batch."""

    tp_plan = {"up": "colwise", "down": "rowwise"}

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(FEATURES, 16)
        self.down = nn.Linear(16, FEATURES)
        self.moe = MoE(FEATURES, 16, 4, top_k=2, bias=True, aux_loss_coef=0.0)
        self.head = nn.Linear(FEATURES, 1)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() < 3:
                    parameter.add_(0.1 * torch.randn_like(parameter))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(torch.tanh(self.up(x)))
        return self.head(x + self.moe(x))


class Toy(L.LightningModule):
    def __init__(self, optimizer: str = "adam", lr: float = 0.02) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(7)
        self.net = Net()
        self.seen: dict[str, list[list[int]]] = {}

    def _see(self, stage: str, batch: Any) -> None:
        self.seen.setdefault(stage, []).append(batch[2].tolist())

    def _loss(self, batch: Any) -> Tensor:
        return F.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        self._see("train", batch)
        loss = self._loss(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._see("val", batch)
        self.log("val_loss", self._loss(batch), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._see("test", batch)
        self.log("test_loss", self._loss(batch), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> list[int]:
        self._see("predict", batch)
        self.net(batch[0])
        return batch[2].tolist()

    def configure_optimizers(self) -> Any:
        if self.hparams.optimizer == "adam":
            return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)


def loader(batch_size: int = 4, length: int = SAMPLES, **options: Any) -> DataLoader:
    return DataLoader(Numbered(length), batch_size=batch_size, **options)


def strategy(name: str) -> Strategy:
    """``"one"`` process, ``"ddp"``, or a layout such as ``"tp2"``, ``"tp2 etp1"``, ``"ep4"``; ``"tp2 file"`` writes files."""
    if name == "one":
        return SingleDeviceStrategy()
    if name.startswith("ddp"):
        return DDPStrategy(find_unused_parameters="unused" in name)
    names = {"tp": "tensor_parallel_size", "ep": "expert_parallel_size", "etp": "expert_tensor_parallel_size"}
    sizes: dict[str, Any] = {"save_distributed_checkpoint": "file" not in name}
    for word in name.replace("file", "").split():
        key = word.rstrip("0123456789")
        sizes[names[key]] = int(word[len(key) :])
    return TEDStrategy(**sizes)


def trainer(name: str, **options: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": torch.distributed.get_world_size() // options.get("num_nodes", 1),
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(strategy=strategy(name), **{**defaults, **options})


def whole_weights(run: L.Trainer) -> dict[str, Tensor]:
    """The full state dict, on every rank."""
    state = run.lightning_module.state_dict()
    if isinstance(run.strategy, TEDStrategy):
        names = Names(run.lightning_module, run.strategy.layouts)
        file = SingleFile(names, run.strategy.mesh, torch.device("cpu"))
        state = file.joined({"state_dict": state}, (), keep=True)["state_dict"]
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_same_everywhere(results: list[dict[str, Tensor]]) -> None:
    """Bit-equal on all ranks."""
    for result in results[1:]:
        for name, tensor in result.items():
            assert torch.equal(tensor, results[0][name]), name
