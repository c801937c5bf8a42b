"""The weights that a run starts from: rank 0's, whatever the layout, built with storage or without."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_ted.collectives.whole import gather_whole
from lightning_ted.errors import UnsupportedError
from lightning_ted.mesh import TEDMesh
from lightning_ted.moe import MoE
from lightning_ted.strategy.partition import PartitionOptions, partition_module
from lightning_ted.topology import Topology
from tests.support.pool import Pools
from tests.support.runs import Toy, assert_same_everywhere, loader, trainer, whole_weights


class _Everything(Toy):
    """Every kind of tensor, drawn from numbers that differ between the processes."""

    def __init__(self) -> None:
        super().__init__("sgd")
        torch.manual_seed(100 + dist.get_rank())
        self.table = nn.Embedding(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.net.moe = MoE(8, 16, 4, bias=True)
        self.tp_plan = {"table": "embedding_rowwise"}


class _WithBuffer(_Everything):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("drawn", torch.randn(5))


def _initial(layout: str, empty: bool) -> dict[str, Tensor]:
    run = trainer(layout)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`trainer.init_module` cannot fully support")
        if empty:
            with run.init_module(empty_init=True):
                module: Toy = _Everything()
            assert all(p.is_meta for p in module.parameters())
        else:
            module = _WithBuffer()
    run.validate(module, loader(), verbose=False)
    assert not any(t.is_meta for t in [*module.parameters(), *module.buffers()])
    return whole_weights(run)


@pytest.mark.parametrize("empty", [False, True], ids=["with storage", "without storage"])
def test_initial_weights_are_those_of_rank_0_under_every_layout(pools: Pools, empty: bool) -> None:
    expected = pools(1).run(_initial, "tp1", empty)
    layouts = [pools(4).run(_initial, layout, empty) for layout in ("tp2", "ep4", "tp2 etp1")]
    assert_same_everywhere([*expected, *(result for results in layouts for result in results)])
    experts = expected[0]["net.moe.experts.down_proj"]
    assert experts.std() > 0 and not torch.equal(experts[0], experts[1])
    assert not torch.equal(expected[0]["net.up.weight"], expected[0]["net.down.weight"].T)


def _train_without_storage() -> dict[str, Tensor]:
    run = trainer("tp2", max_epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with run.init_module(empty_init=True):
            module = _Everything()
    run.fit(module, loader(), loader())
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())
    return whole_weights(run)


def test_a_model_that_was_built_without_storage_trains(pools: Pools) -> None:
    assert_same_everywhere(pools(4).run(_train_without_storage))


class _TiedVocabulary(nn.Module):
    tp_plan = {"emb": "embedding_rowwise", "head": "colwise"}

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(12, 8), nn.Linear(8, 12)
        self.head.weight = self.emb.weight


def _tied_without_storage(tensor: int, late: bool) -> dict[str, Tensor]:
    torch.manual_seed(5)
    mesh = TEDMesh(Topology(dist.get_world_size(), tensor))
    with torch.device("cpu" if late else "meta"):
        model = _TiedVocabulary()
    if late:
        partition_module(model, mesh, PartitionOptions())
        model.head.bias = nn.Parameter(torch.empty(12, device="meta"))
    layouts = partition_module(model, mesh, PartitionOptions())
    return {name: gather_whole(p.detach(), layouts[name], mesh) for name, p in model.named_parameters()}


@pytest.mark.parametrize("late", [False, True], ids=["all without storage", "a bias without storage later"])
def test_a_part_keeps_its_values_when_another_tensor_of_its_module_gets_storage(pools: Pools, late: bool) -> None:
    results = pools(2).run(_tied_without_storage, 2, late)
    assert_same_everywhere([*results, *pools(1).run(_tied_without_storage, 1, late)])
    weight = results[0]["emb.weight"]
    assert weight.std() > 0.5 and not torch.equal(weight[:6], weight[6:])


class _Forgets(nn.Module):
    """Its ``reset_parameters`` leaves one tensor as it finds it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        if kind == "parameter":
            self.scale = nn.Parameter(torch.ones(2))
        elif kind == "buffer":
            self.register_buffer("frequencies", torch.arange(4.0), persistent=False)
        else:
            self.register_buffer("mask", torch.ones(2, 2).tril().bool())

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)


class _HasForgetful(Toy):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.part: Any = nn.Linear(2, 2) if kind == "none" else _Forgets(kind)
        if kind == "none":
            self.bare = nn.Parameter(torch.ones(2))


def _forgotten(kind: str) -> str:
    run = trainer("tp2", max_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with run.init_module(empty_init=True):
            module = _HasForgetful(kind)
    try:
        run.fit(module, loader())
    except UnsupportedError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("parameter", "'scale' of 'part' (_Forgets)"),
        ("buffer", "'frequencies' of 'part' (_Forgets)"),
        ("mask", "'mask' of 'part' (_Forgets)"),
        ("none", "_HasForgetful was built without storage"),
    ],
)
def test_tensors_that_nothing_initialises_are_refused_by_name(pools: Pools, kind: str, words: str) -> None:
    assert all(words in text and "`empty_init=False`" in text for text in pools(2).run(_forgotten, kind))
