"""Dispatch under odd circumstances: nothing hangs, nothing is lost, nothing is sent in vain."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_ted.collectives.recorder import CommRecorder
from lightning_ted.collectives.whole import gather_whole
from lightning_ted.mesh import TEDMesh
from lightning_ted.moe import MoE, auxiliary_loss, expert_counts
from lightning_ted.moe.losses import drop_rate
from lightning_ted.optim.gradients import GradientReducer
from lightning_ted.strategy.partition import PartitionOptions, partition_module
from lightning_ted.topology import Topology
from tests.support.pool import Pools

WIDTH = 8
MODES = {"dtd": PartitionOptions(), "undropped": PartitionOptions(duplicate_token_dropping=False)}


class Layer(nn.Module):
    """One MoE layer in double precision, and a linear layer before it, so that its input needs a gradient."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.before = nn.Linear(WIDTH, WIDTH)
        self.moe = MoE(WIDTH, 16, 4, **{"bias": True, "aux_loss_coef": 0.1, "z_loss_coef": 0.01, **options})  # type: ignore[arg-type]
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(self.before(x))


def favour_one_expert(layer: Layer) -> None:
    with torch.no_grad():
        layer.before.weight.zero_()
        layer.before.bias.fill_(1.0)
        layer.moe.router.weight.zero_()
        layer.moe.router.weight[2] = 1.0


def inputs(lengths: Sequence[int]) -> list[Tensor]:
    """One input for each data rank."""
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(length, WIDTH, generator=generator, dtype=torch.double) for length in lengths]


def loss_of(layer: Layer, x: Tensor) -> Tensor:
    return layer(x).square().sum() + auxiliary_loss(layer)


def oracle(lengths: Sequence[int], one_expert: bool, options: dict[str, object]) -> dict[str, Tensor]:
    layer = Layer(**options)
    if one_expert:
        favour_one_expert(layer)
    x = torch.cat(inputs(lengths))
    # Every data rank adds the same auxiliary loss; the average over ranks holds it once.
    (layer(x).square().sum() / len(lengths) + auxiliary_loss(layer)).backward()
    return {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}


def step(
    topology: Topology,
    mode: str,
    lengths: Sequence[int],
    one_expert: bool = False,
    options: dict[str, object] | None = None,
) -> dict[str, float]:
    """Worst error of every gradient against one process, on one rank."""
    options = options or {}
    mesh = TEDMesh(topology)
    layer = Layer(**options)
    if one_expert:
        favour_one_expert(layer)
    layouts = partition_module(layer, mesh, MODES[mode])
    duplicates = 1 if mode == "dtd" else topology.tensor // topology.expert_tensor
    reducer = GradientReducer(mesh, layouts, duplicates)
    x = inputs(lengths)[topology.coordinates(dist.get_rank()).data]
    loss_of(layer, x).backward()
    reducer.reduce(list(layer.named_parameters()))
    want = oracle(lengths, one_expert, options)
    found = {}
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        whole = gather_whole(parameter.grad, layouts[name], mesh)
        found[name] = (whole - want[name]).abs().max().item()
    return found


LAYOUTS = [Topology(4, 1, 4, 1), Topology(4, 2, 2, 2), Topology(4, 2, 4, 1), Topology(4, 4, 2, 1), Topology(4, 4, 1, 4)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("topology", LAYOUTS, ids=lambda t: f"tp{t.tensor}-ep{t.expert}-etp{t.expert_tensor}")
def test_odd_batches_give_the_gradients_of_one_process(pools: Pools, topology: Topology, mode: str) -> None:
    data = topology.data
    batches = {
        "uneven": [5, 3, 7, 1][:data],
        "one rank is empty": [0, 3, 2, 6][:data] if data > 1 else [3],
        "one token in all": [1, 0, 0, 0][:data],
        "all empty": [0] * data,
    }
    for name, lengths in batches.items():
        for rank in pools(4).run(step, topology, mode, lengths):
            wrong = {key: error for key, error in rank.items() if not error < 1e-12}
            assert not wrong, f"{name}: {wrong}"


@pytest.mark.parametrize("topology", LAYOUTS, ids=lambda t: f"tp{t.tensor}-ep{t.expert}-etp{t.expert_tensor}")
def test_unused_experts_get_zero_gradients(pools: Pools, topology: Topology) -> None:
    lengths = [5, 4, 3, 2][: topology.data]
    for rank in pools(4).run(step, topology, "dtd", lengths, True, {"top_k": 1}):
        assert max(rank.values()) < 1e-11


def traffic(
    topology: Topology, mode: str, tokens: int
) -> tuple[dict[tuple[str, str], int], dict[tuple[str, str], int]]:
    mesh = TEDMesh(topology)
    layer = Layer().float()
    partition_module(layer, mesh, MODES[mode])
    with mesh.recording(CommRecorder()) as recorder:
        layer(torch.randn(tokens, WIDTH)).sum().backward()
    return dict(recorder.calls), dict(recorder.bytes)


def test_groups_of_one_rank_communicate_nothing(pools: Pools) -> None:
    for calls, _ in pools(1).run(traffic, Topology(1), "dtd", 6):
        assert calls == {}
    for calls, _ in pools(4).run(traffic, Topology(4, 1, 1, 1), "dtd", 6):
        assert calls == {}
    for calls, _ in pools(4).run(traffic, Topology(4, 1, 4, 1), "dtd", 6):
        assert {axis for _, axis in calls} == {"expert"}


def test_dropping_duplicates_divides_the_all_to_all_bytes_by_the_tensor_degree(pools: Pools) -> None:
    topology = Topology(4, 2, 2, 2)
    totals = {}
    for mode in MODES:
        sent = [sizes["all_to_all", "expert"] for _, sizes in pools(4).run(traffic, topology, mode, 32)]
        # Counts of rows travel too: 2 experts' counts of 8 bytes to the other rank, in both modes.
        totals[mode] = sum(sent) - 4 * 16
    assert totals["undropped"] == 2 * totals["dtd"]


def metrics(topology: Topology, lengths: Sequence[int]) -> tuple[list[float], float, float]:
    mesh = TEDMesh(topology)
    layer = Layer(capacity_factor=0.5)
    partition_module(layer, mesh, PartitionOptions())
    x = inputs(lengths)[topology.coordinates(dist.get_rank()).data]
    layer(x)
    return expert_counts(layer)["moe"].tolist(), drop_rate(layer)["moe"].item(), auxiliary_loss(layer).item()


def test_counts_and_auxiliary_loss_do_not_depend_on_the_layout(pools: Pools) -> None:
    layer = Layer(capacity_factor=0.5)
    lengths = [6, 6]
    layer(torch.cat(inputs(lengths)))
    counts, loss = expert_counts(layer)["moe"].tolist(), auxiliary_loss(layer).item()
    rates = set()
    for topology in (Topology(4, 2, 2, 2), Topology(4, 2, 4, 1), Topology(2, 1, 2, 1)):
        for rank_counts, rate, rank_loss in pools(topology.world_size).run(metrics, topology, lengths):
            assert rank_counts == counts
            assert rank_loss == pytest.approx(loss, rel=1e-12)
            rates.add(round(rate, 9))
    assert len(rates) == 1 and 0 < rates.pop() < 1
