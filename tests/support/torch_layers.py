"""A layer of torch's, cut in place, beside the same layer in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ted.mesh import TEDMesh
from lightning_ted.strategy.partition import PartitionOptions, partition_module
from lightning_ted.topology import Topology
from tests.support.reduced import reduced

E, HEADS, N, T, S = 16, 4, 2, 5, 6
#: Relative to the norm of what is compared.
OUTPUTS, GRADIENTS = 1e-6, 1e-5


class Holder(nn.Module):
    """A model whose ``layer`` is called as a case says."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)


def perturbed(layer: nn.Module) -> Holder:
    """With biases and norms that are not what they are initialised to."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return Holder(layer)


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def outputs_of(output: Any) -> list[Tensor]:
    return [x for x in (output if isinstance(output, tuple) else (output,)) if x is not None]


def away(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-12)).item()


def differences(
    layer: nn.Module,
    inputs: list[Tensor],
    call: Callable[[nn.Module, list[Tensor]], Any],
    topology: Topology,
    options: PartitionOptions | None = None,
) -> tuple[float, float]:
    """Of outputs, and of the gradients of every parameter and input: the largest relative difference from one process."""
    whole = perturbed(layer)
    cut = copy.deepcopy(whole)
    mesh = TEDMesh(topology)
    layouts = partition_module(cut, mesh, options or PartitionOptions())
    assert any(layout.cuts for layout in layouts.values())
    leaves = [[x.clone().requires_grad_() for x in inputs] for _ in range(2)]

    def loss(outputs: list[Tensor]) -> Tensor:
        weights = tensors(*(tuple(x.shape) for x in outputs))
        return sum(((x * w).sum() + x.square().sum() for x, w in zip(outputs, weights, strict=True)), torch.zeros(()))

    theirs = outputs_of(call(whole, leaves[0]))
    loss(theirs).backward()
    with reduced(cut, mesh, layouts, options) as gradients:
        ours = outputs_of(call(cut, leaves[1]))
        loss(ours).backward()
    expected = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    pairs = [(gradients[name], expected[name]) for name in expected]
    pairs += [(b.grad, a.grad) for a, b in zip(*leaves, strict=True) if a.grad is not None]  # type: ignore[misc]
    return max(map(away, ours, theirs)), max(away(ours, theirs) for ours, theirs in pairs)


def triangle(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def padding() -> Tensor:
    return torch.tensor([[False] * (S - 2) + [True] * 2, [False] * S])


def per_head(targets: int = T, samples: int = N) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(samples * HEADS, targets, S, generator=generator) < 0.3


def assert_close(found: dict[str, tuple[float, float]]) -> None:
    for name, (outputs, gradients) in found.items():
        assert outputs < OUTPUTS and gradients < GRADIENTS, f"{name}: {outputs:.1e} {gradients:.1e}"


def encoder(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(E, HEADS, 32, dropout=0.0, **options)


def decoder(**options: Any) -> nn.Module:
    return nn.TransformerDecoderLayer(E, HEADS, 32, dropout=0.0, **options)
