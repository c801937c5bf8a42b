"""Recomputation of what is compiled: by blocks, and from without."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lightning_ted.mesh import TEDMesh
from lightning_ted.recompute import RecomputeOptions, checkpoint_blocks
from lightning_ted.strategy.partition import PartitionOptions, partition_module
from lightning_ted.topology import Topology
from tests.support.models import TinyConfig
from tests.support.parity import batches, build, relative
from tests.support.pool import Pools
from tests.support.stacks import Block, Stack

TP2 = Topology(2, tensor=2)
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")


class Deep(Block):
    """A block that goes on with the outcome of a collective."""

    def __init__(self) -> None:
        super().__init__()
        self.second = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(super().forward(x).tanh())


class DeepStack(Stack):
    tp_plan = Stack.tp_plan | {"blocks.*.second.up": "colwise", "blocks.*.second.down": "rowwise"}


def compiled(model: nn.Module, blocks: nn.ModuleList, how: str) -> None:
    if how == "whole":
        model.compile(backend="aot_eager")
    for index, block in enumerate(list(blocks)):
        if how == "in place":
            block.compile(backend="aot_eager")
        elif how == "wrapped":
            blocks[index] = torch.compile(block, backend="aot_eager")


def backward(loss: Tensor) -> int:
    """The number of collectives in a backward pass, compiled ones included."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        loss.backward()
    names = Counter(event.name.removeprefix("_c10d_functional::") for event in profiled.events() or ())
    return sum(count for name, count in names.items() if name.startswith(COLLECTIVES))


def dense(how: str, mode: Any) -> tuple[list[Tensor], int]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = DeepStack(Deep(), Deep())
    partition_module(model, TEDMesh(TP2), PartitionOptions())
    compiled(model, model.blocks, how)
    checkpoint_blocks(model, RecomputeOptions(mode) if mode else None)
    x = torch.linspace(-1, 1, 24).view(3, 8).requires_grad_()
    model(x).square().sum().backward()  # compiles
    model.zero_grad()
    calls = backward(model(x).square().sum())
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None], calls


@pytest.mark.parametrize("how", ["in place", "wrapped", "whole"])
def test_compiled_dense_blocks(pools: Pools, how: str) -> None:
    want = pools(2).run(dense, "not", None)
    for mode in ("full", "comm_aware"):
        for (got, calls), (expected, fewest) in zip(pools(2).run(dense, how, mode), want, strict=True):
            assert len(got) == len(expected) == 16 and all(map(torch.equal, got, expected))
            assert calls > fewest if mode == "full" else calls == fewest


def mixture(how: str, mode: Any, topology: Topology, options: PartitionOptions) -> tuple[dict[str, Tensor], int]:
    torch._dynamo.reset()
    model = build(TinyConfig(), torch.float32)
    partition_module(model, TEDMesh(topology), options)
    compiled(model, model.blocks, how)
    checkpoint_blocks(model, RecomputeOptions(mode) if mode else None)
    data = topology.data
    tokens = batches(TinyConfig(), data)[0].chunk(data)[topology.coordinates(dist.get_rank()).data]
    calls = backward(model.step(tokens)[1])
    return {
        name.replace("_orig_mod.", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }, calls


@pytest.mark.parametrize(
    ("how", "topology", "options"),
    [
        ("in place", Topology(2, 2, 1, 2), PartitionOptions()),
        ("wrapped", Topology(2, 2, 2, 1), PartitionOptions(sequence_parallel=True)),
        ("whole", Topology(2, 2, 2, 1), PartitionOptions()),
    ],
    ids=["in place", "wrapped, sequence", "whole"],
)
def test_compiled_blocks_with_experts(pools: Pools, how: str, topology: Topology, options: PartitionOptions) -> None:
    want = pools(2).run(mixture, "not", None, topology, options)
    for mode in (None, "comm_aware") if how == "in place" else ("comm_aware",):
        ranks = pools(2).run(mixture, how, mode, topology, options)
        for (got, calls), (expected, fewest) in zip(ranks, want, strict=True):
            assert calls == fewest
            for name, gradient in expected.items():
                # Where a graph is broken decides on the strides of a gradient, and those on the order of a bias's sum.
                assert relative(got[name], gradient) < 1e-6, name
