"""A checkpoint of any layout is read by any other: weights and moments bit for bit, only what a rank needs, and the next step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_ted import TEDStrategy
from lightning_ted.checkpoint.distributed import Source
from lightning_ted.checkpoint.reader import Tensors
from lightning_ted.checkpoint.single_file import SingleFile
from lightning_ted.checkpoint.tree import Names
from lightning_ted.moe import MoE
from tests.support.pool import Pools
from tests.support.runs import SAMPLES, Toy, assert_close, loader

#: World size, and what the strategy is given.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {}),
    "2 tp2": (2, {"tensor_parallel_size": 2, "optimizer_tile_size": 32}),
    "2 ep2": (2, {"expert_parallel_size": 2, "zero_stage": 2}),
    "4 tp2 ep2": (4, {"tensor_parallel_size": 2, "expert_parallel_size": 2, "offload_optimizer": True}),
    "4 tp4 ep2 folded": (
        4,
        {
            "tensor_parallel_size": 4,
            "expert_parallel_size": 2,
            "expert_tensor_parallel_size": 1,
            "rank_order": "data_first",
        },
    ),
    "8 tp2 ep4": (8, {"tensor_parallel_size": 2, "expert_parallel_size": 4, "expert_tensor_parallel_size": 1}),
    "8 tp4 etp2": (
        8,
        {
            "tensor_parallel_size": 4,
            "expert_parallel_size": 2,
            "expert_tensor_parallel_size": 2,
            "zero_stage": 2,
            "optimizer_tile_size": 64,
        },
    ),
}
#: What each keeps of an element.
OPTIMIZERS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}


class Model(Toy):
    """Fused projections are cut block by block: the experts' gates and values, too."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(optimizer)
        self.net.moe = MoE(8, 16, 4, top_k=2, aux_loss_coef=0.0)
        self.register_buffer("scale", torch.full((3,), 2.0))

    def configure_optimizers(self) -> Any:
        if self.hparams.optimizer == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


@dataclass
class Read:
    """What one rank has read of a checkpoint.

    Attributes:
        weights: Whole ones, as they were read.
        moments: The same of the optimizer's states.
        bytes_read: Bytes of tensors.
        needed: Of what this rank holds.
        stepped: Weights one step later.

    """

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    bytes_read: int
    needed: int
    stepped: dict[str, Tensor] = field(default_factory=dict)


class Reads(L.Callback):
    """Before each step, takes the state of another checkpoint, as a run that is resumed does."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths
        self.read: list[Read] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        strategy: Any = trainer.strategy
        with _counted() as tensors:
            checkpoint = strategy.load_checkpoint(self.paths[len(self.read)])
            strategy.load_model_state_dict(checkpoint)
            strategy.load_optimizer_state_dict(checkpoint)
        states = [optimizer.state_dict() for optimizer in trainer.optimizers]
        per_element = [
            value for entries in states[0]["state"].values() for key, value in entries.items() if key != "step"
        ]
        needed = sum(tensor.nbytes for tensor in (*module.state_dict().values(), *per_element))
        joined = _joined(trainer, {"state_dict": module.state_dict(), "optimizer_states": states})
        names = [name for name, _ in module.named_parameters()]
        moments = {
            f"{names[index]}/{key}": torch.as_tensor(value).clone()
            for index, entries in joined["optimizer_states"][0]["state"].items()
            for key, value in entries.items()
        }
        self.read.append(
            Read(_copied(joined["state_dict"]), moments, sum(found.bytes_read for found in tensors), needed)
        )

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.read[-1].stepped = _copied(_joined(trainer, {"state_dict": module.state_dict()})["state_dict"])


@contextmanager
def _counted() -> Iterator[list[Tensors]]:
    """The files that are read from within it."""
    found: list[Tensors] = []
    read = Tensors.read

    def noting(tensors: Tensors, *args: Any) -> None:
        read(tensors, *args)
        found.append(tensors)

    Tensors.read = noting  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Tensors.read = read  # type: ignore[method-assign]


def _joined(run: L.Trainer, checkpoint: dict[str, Any]) -> dict[str, Any]:
    strategy: Any = run.strategy
    file = SingleFile(Names(run.lightning_module, strategy.layouts), strategy.mesh, torch.device("cpu"))
    return file.joined(checkpoint, run.optimizers, keep=True)


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _run(layout: str, kind: str, steps: int, *callbacks: L.Callback) -> L.Trainer:
    """Steps over all samples each."""
    world, options = LAYOUTS[layout]
    run = L.Trainer(
        strategy=TEDStrategy(**options),
        accelerator="cpu",
        devices=world,
        max_epochs=steps,
        limit_train_batches=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    data = world // options.get("tensor_parallel_size", 1)
    run.fit(Model(kind), loader(SAMPLES // data))
    return run


def _write(layout: str, folder: str) -> None:
    for kind in OPTIMIZERS:
        _run(layout, kind, 2).save_checkpoint(f"{folder}/{layout} {kind}")


def _read(layout: str, folder: str) -> dict[str, list[Read]]:
    """By optimizer, what was read of the checkpoint of each layout."""
    found = {}
    for kind in OPTIMIZERS:
        _run(layout, kind, len(LAYOUTS), reads := Reads([f"{folder}/{source} {kind}" for source in LAYOUTS]))
        found[kind] = reads.read
    return found


@pytest.fixture(scope="module")
def written(pools: Pools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    for layout, (world, _) in LAYOUTS.items():
        pools(world).run(_write, layout, str(folder))
    return folder


@pytest.fixture(scope="module")
def of_one_process(pools: Pools, written: Path) -> dict[str, list[Read]]:
    return pools(1).run(_read, "1", str(written))[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_reads_any_other(
    pools: Pools, written: Path, of_one_process: dict[str, list[Read]], layout: str
) -> None:
    ranks = pools(LAYOUTS[layout][0]).run(_read, layout, str(written))
    for kind, moments in OPTIMIZERS.items():
        for place, source in enumerate(LAYOUTS):
            saved = Source(written / f"{source} {kind}", None)
            assert saved.model is not None and saved.training is not None
            assert len(saved.training.shapes) == len(moments) * len(dict(Model(kind).named_parameters()))
            weights = {name: saved.model.whole(name) for name in saved.model.shapes}
            states = {name: saved.training.whole(name) for name in saved.training.shapes}
            for read in (rank[kind][place] for rank in ranks):
                assert read.bytes_read == read.needed, source
                assert read.weights.keys() == weights.keys()
                assert not [name for name in weights if not torch.equal(read.weights[name], weights[name])], source
                different = [
                    name
                    for name, state in states.items()
                    if not torch.equal(read.moments[name.removeprefix("optimizer/0/")], state)
                ]
                assert not different, source
            # The step after it is that of one process.
            assert_close(ranks[0][kind][place].stepped, of_one_process[kind][place].stepped, 2e-6)


class _Wide(L.LightningModule):
    tp_plan = {"up": "colwise", "tied": "colwise", "down": "rowwise"}

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 4096), nn.Linear(4096, 64)
        self.moe = MoE(64, 1024, 4, top_k=1)
        self.tied = nn.Linear(64, 4096, bias=False)
        self.tied.weight = self.up.weight

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.moe(self.down(self.up(torch.ones(4, 64)))).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


def _wide(path: str) -> int:
    run = L.Trainer(
        strategy=TEDStrategy(tensor_parallel_size=2, expert_parallel_size=2),
        accelerator="cpu",
        devices=4,
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    run.fit(module := _Wide(), loader())
    run.save_checkpoint(path)
    strategy: Any = run.strategy
    return sum(torch.Size(strategy.layouts[name].global_shape).numel() for name, _ in module.named_parameters())


def test_each_element_is_on_disk_once(pools: Pools, tmp_path: Path) -> None:
    count = pools(4).run(_wide, str(tmp_path / "x"))[0]
    size = sum(path.stat().st_size for path in (tmp_path / "x").rglob("*") if path.is_file())
    # In fp32, weights and two moments.
    assert 12 * count <= size < 1.02 * 12 * count
