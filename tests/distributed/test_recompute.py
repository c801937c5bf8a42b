"""Recomputation that does not communicate: counts by phase, and gradients that are those of a model without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ted.collectives.phase import current_phase
from lightning_ted.collectives.recorder import CommRecorder
from lightning_ted.mesh import TEDMesh
from lightning_ted.moe import Routing, TopKRouter
from lightning_ted.recompute import RecomputeOptions, checkpoint_blocks
from lightning_ted.strategy.partition import PartitionOptions, partition_module
from lightning_ted.topology import Topology
from tests.support.models import TinyConfig, TinyDecoder
from tests.support.parity import batches, build
from tests.support.pool import Pools
from tests.support.reads import counted_reads

DTD, UNDROPPED = PartitionOptions(), PartitionOptions(duplicate_token_dropping=False)
SEQUENCE = PartitionOptions(sequence_parallel=True)
FULL, ALL = RecomputeOptions("full"), RecomputeOptions("comm_aware")
DEFAULT, ROWS = RecomputeOptions("comm_aware", "default"), RecomputeOptions("comm_aware", "all_to_all")
TP2 = Topology(2, tensor=2)
TINY = TinyConfig()

Counts = dict[tuple[str, str], int]


class Noisy(TopKRouter):
    def forward(self, tokens_TD: Tensor) -> Routing:
        return super().forward(tokens_TD + 0.1 * torch.randn_like(tokens_TD))


@dataclass
class Seen:
    """One forward and backward.

    Attributes:
        gradients: By name.
        calls, sent: By phase, and in it by kind and axis.
        products: Matrix products of the recomputation.
        reads: Numbers read on the host in the backward pass.

    """

    gradients: dict[str, Tensor]
    loss: float = 0.0
    calls: dict[str, Counts] = field(default_factory=dict)
    sent: dict[str, Counts] = field(default_factory=dict)
    products: int = 0
    reads: int = 0


class CountProducts(TorchDispatchMode):
    """Counts matrix products within recomputations."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if current_phase() == "recomputation":
            self.count += func._schema.name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::_grouped_mm")
        return func(*args, **(kwargs or {}))


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def decoder(
    mesh: TEDMesh,
    options: PartitionOptions,
    recompute: RecomputeOptions | None,
    config: TinyConfig,
    noisy: bool = False,
) -> TinyDecoder:
    model = build(config, torch.float32)
    if noisy:
        router = Noisy(config.width, config.experts, config.top_k)
        router.load_state_dict(model.blocks[1].ffn.router.state_dict())
        model.blocks[1].ffn.router = router
    partition_module(model, mesh, options)
    checkpoint_blocks(model, recompute)
    return model


def one_step(
    mesh: TEDMesh, options: PartitionOptions, recompute: RecomputeOptions | None, config: TinyConfig, noisy: bool
) -> Seen:
    model = decoder(mesh, options, recompute, config, noisy)
    data = mesh.topology.data
    tokens = batches(config, data)[0].chunk(data)[mesh.axis("data").rank]
    torch.manual_seed(5)
    with mesh.recording(CommRecorder()) as recorder:
        _, loss = model.step(tokens)
        with counted_reads() as reads, CountProducts() as products:
            loss.backward()
    seen = Seen(gradients(model), loss.item(), products=products.count, reads=len(reads))
    for key, calls in recorder.calls_by.items():
        seen.calls.setdefault(key.phase, {})[key.kind, key.axis] = calls
        seen.sent.setdefault(key.phase, {})[key.kind, key.axis] = recorder.bytes_by[key]
    return seen


def steps(
    topology: Topology,
    options: PartitionOptions,
    recompute: Sequence[RecomputeOptions | None],
    config: TinyConfig = TINY,
    noisy: bool = False,
) -> list[Seen]:
    mesh = TEDMesh(topology, ranks_per_node=2)
    return [one_step(mesh, options, each, config, noisy) for each in recompute]


LAYOUTS = {
    "tp2-ep2": (Topology(4, 2, 2, 2), DTD),
    "tp2-ep2 undropped": (Topology(4, 2, 2, 2), UNDROPPED),
    "tp2-ep2 sequence": (Topology(4, 2, 2, 2), SEQUENCE),
    "folded": (Topology(4, 2, 4, 1), DTD),
    "folded sequence": (Topology(4, 2, 2, 1), SEQUENCE),
    "tp2-etp2": (Topology(2, 2, 1, 2), DTD),
    "tp2-etp2 undropped": (Topology(2, 2, 1, 2), UNDROPPED),
    "ep2": (Topology(2, 1, 2, 1), DTD),
    "etp2": (Topology(4, 2, 1, 2), PartitionOptions(overlap_chunks=2)),
    "hierarchical": (Topology(4, 1, 4, 1), PartitionOptions(dispatcher="hierarchical", overlap_chunks=3)),
    "chunks": (Topology(4, 2, 2, 2), PartitionOptions(overlap_chunks=2)),
}
KEPT = {
    "all": {"all_to_all", "all_reduce", "reduce_scatter", "all_gather"},
    "default": {"all_to_all", "all_reduce", "reduce_scatter"},
    "all_to_all": {"all_to_all"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_kept_is_neither_sent_nor_read_nor_multiplied_again(pools: Pools, layout: str) -> None:
    topology, options = LAYOUTS[layout]
    for none, full, *aware in pools(topology.world_size).run(
        steps, topology, options, [None, FULL, ALL, DEFAULT, ROWS]
    ):
        for seen in (full, *aware):
            assert seen.loss == none.loss
            for name, gradient in none.gradients.items():
                assert torch.equal(seen.gradients[name], gradient), name
            for phase in ("forward", "backward"):
                assert (seen.calls[phase], seen.sent[phase]) == (none.calls[phase], none.sent[phase])
        again, bytes_again = full.calls["recomputation"], full.sent["recomputation"]
        assert again and all(calls <= none.calls["forward"].get(key, 0) for key, calls in again.items())
        assert all(sent <= none.sent["forward"][key] for key, sent in bytes_again.items())
        for seen, kinds in zip(aware, KEPT.values(), strict=True):
            # The sum over an expert's shards is of one piece with the all-to-all after it.
            left = {
                key
                for key in again
                if key[0] not in kinds and (key[0] == "all_gather" or key[1] != "expert_tensor" or topology.expert == 1)
            }
            repeated = seen.sent.get("recomputation", {})
            assert repeated.keys() == left
            for key, size in repeated.items():
                # Counts of rows, which every policy keeps, are gathered by the same collective as rows.
                assert size == bytes_again[key] if key[0] != "all_gather" else 0 < size <= bytes_again[key]
            assert seen.reads == 0
        assert full.reads == 1
        # Attention's output, the dense block's down projection, and the experts': once each, where a collective follows.
        tensor = topology.tensor > 1
        journeys = options.overlap_chunks if topology.expert * topology.expert_tensor > 1 else 0
        assert full.products - aware[0].products == 3 * tensor + journeys
        assert "recomputation" not in aware[0].calls


def test_dropping_and_keeping_lower_the_all_to_all_bytes_by_the_papers_factors(pools: Pools) -> None:
    topology = Topology(4, 2, 2, 2)
    rows: dict[tuple[bool, str], int] = {}
    for options in (DTD, UNDROPPED):
        ranks = pools(4).run(steps, topology, options, [None, FULL, ALL])
        for index, mode in enumerate(("none", "full", "comm_aware")):
            rows[options is DTD, mode] = 0
            for rank in ranks:
                for phase, sent in rank[index].sent.items():
                    # Counts of rows travel too: those of two experts to the other rank, 8 bytes each.
                    told = 16 if phase != "backward" else 0
                    rows[options is DTD, mode] += sent["all_to_all", "expert"] - told if sent else 0
    for dropped in (True, False):
        assert rows[dropped, "comm_aware"] == rows[dropped, "none"]
        assert 3 * rows[dropped, "comm_aware"] == 2 * rows[dropped, "full"] > 0
    for mode in ("none", "full", "comm_aware"):
        assert rows[False, mode] == 2 * rows[True, mode]


MODELS = {
    "top 1": {"config": TinyConfig(top_k=1)},
    "top 3": {"config": TinyConfig(top_k=3, score="sigmoid")},
    "capacity": {"config": TinyConfig(capacity_factor=0.5)},
    "dropout": {"config": TinyConfig(dropout=0.3)},
    "noise": {"config": TinyConfig(), "noisy": True},
    "tied block": {"config": TinyConfig(shared=True)},
    "packed, tied weights": {"config": TinyConfig(packed=True, vocab_parallel=True, tied=True)},
}


def models(topology: Topology, options: PartitionOptions) -> dict[str, list[Seen]]:
    every = [None, FULL, ALL, ROWS]
    # A stack whose tokens are split must not hold a block twice.
    chosen = {name: model for name, model in MODELS.items() if not options.sequence_parallel or name != "tied block"}
    return {name: steps(topology, options, every, **model) for name, model in chosen.items()}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("topology", "options"),
    [(Topology(4, 2, 2, 2), DTD), (Topology(4, 2, 2, 1), SEQUENCE), (Topology(2, 2, 2, 1), UNDROPPED)],
    ids=["dropped", "sequence", "undropped"],
)
def test_every_kind_of_model_gets_the_same_gradients(
    pools: Pools, topology: Topology, options: PartitionOptions
) -> None:
    for rank in pools(topology.world_size).run(models, topology, options):
        for name, (none, full, *aware) in rank.items():
            for seen in (full, *aware):
                assert seen.loss == none.loss, name
                assert all(torch.equal(seen.gradients[n], g) for n, g in none.gradients.items()), name
            assert "recomputation" not in aware[0].calls
            # The seed of a stream of random numbers is drawn on the host, and not read from a device.
            assert aware[0].reads == 0 or name in ("dropout", "noise")
            assert full.calls["recomputation"], name
