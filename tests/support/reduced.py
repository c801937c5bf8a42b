"""Gradients as training reduces them, without a Trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_ted.layout import ParamLayout
from lightning_ted.mesh import TEDMesh
from lightning_ted.optim.options import TrainingOptions
from lightning_ted.strategy.partition import PartitionOptions
from lightning_ted.strategy.training import Training


def training_of(
    module: nn.Module,
    mesh: TEDMesh,
    layouts: Mapping[str, ParamLayout],
    optimizer: torch.optim.Optimizer | None = None,
    partition: PartitionOptions | None = None,
    options: TrainingOptions | None = None,
    working: Mapping[str, torch.dtype] | None = None,
    whole: bool = False,
) -> Training:
    """The training of a module that has been cut, by SGD unless an optimizer is given."""
    training = Training(
        dict(module.named_parameters()),
        mesh,
        layouts,
        partition or PartitionOptions(),
        options or TrainingOptions(),
        working or {},
        torch.device("cpu"),
    )
    training.shard([optimizer or torch.optim.SGD(module.parameters(), lr=0.1)], lambda _: whole)
    return training


@contextmanager
def reduced(
    module: nn.Module,
    mesh: TEDMesh,
    layouts: Mapping[str, ParamLayout],
    partition: PartitionOptions | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Yields what will hold, after the context with a backward pass in it, the whole gradients by name."""
    training = training_of(module, mesh, layouts, partition=partition)
    found: dict[str, Tensor] = {}
    with training.backward():
        yield found
    for name, parameter in module.named_parameters():
        gradient = training.full_gradient(name) if parameter.requires_grad else None
        if gradient is not None:
            found[name] = gradient
    training.close()
