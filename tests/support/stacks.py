"""Stacks of small dense blocks, cut in two."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_ted.mesh import TEDMesh
from lightning_ted.strategy.partition import PartitionOptions, partition_module
from lightning_ted.topology import Topology

TP2 = Topology(2, tensor=2)
SEQUENCE = PartitionOptions(sequence_parallel=True)


def cut(model: nn.Module, options: PartitionOptions = SEQUENCE) -> Any:
    partition_module(model, TEDMesh(TP2), options)
    return model


class Block(nn.Module):
    """A dense block of which a subclass says what happens around its two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Stack(nn.Module):
    tp_plan = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x
