"""Dispatch under odd circumstances: nothing hangs, nothing is lost, nothing is sent in vain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_ted.collectives import exchange
from lightning_ted.collectives.recorder import CommRecorder
from lightning_ted.mesh import TEDMesh
from lightning_ted.moe import MoE, Routing, TopKRouter, auxiliary_loss, expert_counts
from lightning_ted.moe.losses import drop_rate
from lightning_ted.strategy.partition import PartitionOptions, partition_module
from lightning_ted.topology import Topology
from tests.support.pool import Pools
from tests.support.reads import counted_reads
from tests.support.reduced import reduced

WIDTH = 8
MODES = {"dtd": PartitionOptions(), "undropped": PartitionOptions(duplicate_token_dropping=False)}
#: Other ways of sending the same.
WAYS = {
    "chunks": PartitionOptions(overlap_chunks=3),
    "hierarchical": PartitionOptions(dispatcher="hierarchical"),
    "hierarchical chunks": PartitionOptions(dispatcher="hierarchical", overlap_chunks=2),
}
OPTIONS = MODES | WAYS


class Layer(nn.Module):
    """One MoE layer in double precision, and a linear layer before it, so that its input needs a gradient."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.before = nn.Linear(WIDTH, WIDTH)
        if isinstance(options.get("shared_expert"), type):
            options = {**options, "shared_expert": options["shared_expert"]()}
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
    mesh = TEDMesh(topology, ranks_per_node=2)
    layer = Layer(**options)
    if one_expert:
        favour_one_expert(layer)
    layouts = partition_module(layer, mesh, OPTIONS[mode])
    x = inputs(lengths)[topology.coordinates(dist.get_rank()).data]
    with reduced(layer, mesh, layouts, OPTIONS[mode]) as gradients:
        loss_of(layer, x).backward()
    want = oracle(lengths, one_expert, options)
    return {name: (gradients[name] - want[name]).abs().max().item() for name, _ in layer.named_parameters()}


LAYOUTS = [Topology(4, 1, 4, 1), Topology(4, 2, 2, 2), Topology(4, 2, 4, 1), Topology(4, 4, 2, 1), Topology(4, 4, 1, 4)]


@pytest.mark.parametrize("mode", OPTIONS)
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


def host_reads(topology: Topology, mode: str, options: dict[str, object], dtype: torch.dtype) -> tuple[int, int]:
    """Numbers that a layer's forward and backward read on the host, each a synchronisation on a GPU."""
    layer = Layer(**options).to(dtype)
    partition_module(layer, TEDMesh(topology, ranks_per_node=2), OPTIONS[mode])
    x = inputs([6] * topology.data)[topology.coordinates(dist.get_rank()).data].to(dtype).requires_grad_()
    with counted_reads() as reads:
        output = layer.moe(layer.before(x))
        forward = len(reads)
        output.sum().backward()
    return forward, len(reads) - forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["grouped", "one by one"])
@pytest.mark.parametrize("options", [{}, {"capacity_factor": 0.5}], ids=["dropless", "capacity"])
@pytest.mark.parametrize("topology", LAYOUTS, ids=lambda t: f"tp{t.tensor}-ep{t.expert}-etp{t.expert_tensor}")
def test_layer_reads_the_host_once(
    pools: Pools, topology: Topology, options: dict[str, object], dtype: torch.dtype
) -> None:
    for forward, backward in pools(4).run(host_reads, topology, "dtd", options, dtype):
        assert (forward, backward) == (1, 0)


@pytest.mark.parametrize("mode", WAYS)
def test_layer_reads_the_host_once_however_it_sends(pools: Pools, mode: str) -> None:
    for reads in pools(4).run(host_reads, Topology(4, 1, 4, 1), mode, {}, torch.float32):
        assert reads == (1, 0)


def output_and_traffic(mode: str) -> tuple[Tensor, Tensor, dict[tuple[str, str], int]]:
    mesh = TEDMesh(Topology(4, 1, 4, 1), ranks_per_node=2)
    layer = Layer()
    partition_module(layer, mesh, OPTIONS[mode])
    x = inputs([6, 9, 5, 7])[dist.get_rank()].requires_grad_()
    with mesh.recording(CommRecorder()) as recorder:
        output = layer(x)
        output.square().sum().backward()
    assert x.grad is not None
    return output.detach(), x.grad, dict(recorder.calls)


def test_hierarchical_exchange_gives_the_same_bits_by_messages_inside_nodes_and_across(pools: Pools) -> None:
    direct, staged = pools(4).run(output_and_traffic, "dtd"), pools(4).run(output_and_traffic, "hierarchical")
    for (output, grad, calls), (other, other_grad, other_calls) in zip(direct, staged, strict=True):
        assert torch.equal(output, other) and torch.equal(grad, other_grad)
        # Counts, rows out and back, and the same two ways in backward.
        assert {key: n for key, n in calls.items() if key[0] == "all_to_all"} == {("all_to_all", "expert"): 5}
        inside_and_across = {("all_to_all", "expert_inside"): 5, ("all_to_all", "expert_across"): 5}
        assert {key: n for key, n in other_calls.items() if key[0] == "all_to_all"} == inside_and_across


class Dense(nn.Module):
    """A shared expert that says when it runs."""

    def __init__(self, log: list[str] | None = None) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.log = [] if log is None else log

    def forward(self, x: Tensor) -> Tensor:
        self.log.append("dense")
        y = self.linear(x)
        y.register_hook(lambda grad: self.log.append("dense backward"))
        return y


def order_of_events(mode: str) -> list[str]:
    log: list[str] = []
    layer = Layer(shared_expert=Dense(log))
    partition_module(layer, TEDMesh(Topology(4, 1, 4, 1), ranks_per_node=2), OPTIONS[mode])
    x = inputs([6] * 4)[dist.get_rank()]
    layer.moe.experts.register_forward_pre_hook(lambda module, args: log.append("experts"))

    def logging(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            log.append(name)
            return function(*args)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("start_all_to_all_rows", "wait"):
            patch.setattr(exchange, name, logging(name.partition("_")[0], getattr(exchange, name)))
        layer(x).sum().backward()
    return log


def test_dense_branch_computes_while_tokens_are_under_way(pools: Pools) -> None:
    forward = ["start", "dense", "wait", "experts", "start", "wait"]
    backward = ["start", "wait", "start", "dense backward", "wait"]
    for log in pools(4).run(order_of_events, "dtd"):
        assert log == forward + backward


def test_experts_compute_while_the_next_chunk_is_under_way(pools: Pools) -> None:
    forward = ["start"] * 3 + ["dense"] + ["wait", "experts", "start"] * 3 + ["wait"] * 3
    backward = ["start"] * 3 + ["wait", "start"] * 3 + ["dense backward"] + ["wait"] * 3
    for log in pools(4).run(order_of_events, "chunks"):
        assert log == forward + backward


class PlannedDense(nn.Module):
    """A shared expert that tensor parallelism cuts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.tp_plan = {"up": "colwise", "down": "rowwise"}

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


@pytest.mark.parametrize("dense", [Dense, PlannedDense])
@pytest.mark.parametrize("mode", OPTIONS)
@pytest.mark.parametrize("topology", LAYOUTS, ids=lambda t: f"tp{t.tensor}-ep{t.expert}-etp{t.expert_tensor}")
def test_shared_expert_gives_the_gradients_of_one_process(
    pools: Pools, topology: Topology, mode: str, dense: type[nn.Module]
) -> None:
    lengths = [5, 3, 7, 1][: topology.data]
    for rank in pools(4).run(step, topology, mode, lengths, False, {"shared_expert": dense}):
        assert any("shared_expert" in name for name in rank)
        assert max(rank.values()) < 1e-12


def autocast_traffic(topology: Topology, enabled: bool) -> dict[tuple[str, str], int]:
    layer = Layer().float()
    partition_module(layer, mesh := TEDMesh(topology), PartitionOptions())
    with mesh.recording(CommRecorder()) as recorder, torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        layer(torch.ones(8, WIDTH)).sum().backward()
    return dict(recorder.bytes)


def test_autocast_halves_what_is_sent_for_the_experts(pools: Pools) -> None:
    topology = Topology(4, 2, 2, 2)
    counts = 2 * 8  # of the rows for the other rank's two experts
    for wide, narrow in zip(
        pools(4).run(autocast_traffic, topology, False), pools(4).run(autocast_traffic, topology, True), strict=True
    ):
        assert wide["all_to_all", "expert"] - counts == 2 * (narrow["all_to_all", "expert"] - counts) > 0
        assert wide["reduce_scatter", "expert_tensor"] == 2 * narrow["reduce_scatter", "expert_tensor"]


class Noisy(TopKRouter):
    def forward(self, tokens_TD: Tensor) -> Routing:
        self.noise_TD = torch.randn_like(tokens_TD)
        return super().forward(tokens_TD + self.noise_TD)


def noise(topology: Topology) -> tuple[Tensor, Tensor]:
    layer = Layer(router=Noisy(WIDTH, 4))
    partition_module(layer, TEDMesh(topology), PartitionOptions())
    torch.manual_seed(0)
    layer(torch.ones(7, WIDTH, dtype=torch.double))
    return layer.moe.router.noise_TD, torch.rand(3)


def test_router_noise_differs_on_tensor_peers_and_leaves_their_common_stream_alone(pools: Pools) -> None:
    (first, after_first), (second, after_second) = pools(2).run(noise, Topology(2, 2))
    assert torch.equal(after_first, after_second)
    assert len(first) == 4 and len(second) == 3  # of seven tokens
    assert not torch.isclose(first[:3], second).any()
