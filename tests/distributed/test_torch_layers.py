"""torch's own attention and transformer layers, cut with no plan of the user's, compute what one process computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ted.collectives.recorder import CommRecorder
from lightning_ted.errors import UnsupportedError
from lightning_ted.mesh import TEDMesh
from lightning_ted.moe import MoE
from lightning_ted.strategy.partition import PartitionOptions, partition_module
from lightning_ted.tensor_parallel.attention import HeadParallelAttention
from lightning_ted.topology import Topology
from tests.support.pool import Pools
from tests.support.reduced import reduced
from tests.support.stacks import TP2

E, HEADS, N, L, S = 16, 4, 2, 5, 6
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


# -- attention -------------------------------------------------------------------------------------------------------------


def triangle(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def padding() -> Tensor:
    return torch.tensor([[False] * (S - 2) + [True] * 2, [False] * S])


def per_head(targets: int = L, samples: int = N) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(samples * HEADS, targets, S, generator=generator) < 0.3


#: Options of the module, of the call, and which inputs are given: "self", "cross" or "kv" (keys that are not the values).
Case = tuple[dict[str, Any], dict[str, Any], str]
ATTENTION: dict[str, Case] = {
    "plain": ({}, {}, "self"),
    "no bias": ({"bias": False}, {}, "self"),
    "batch first": ({"batch_first": True}, {}, "self"),
    "no weights": ({"batch_first": True}, {"need_weights": False}, "self"),
    "weights of each head": ({}, {"average_attn_weights": False}, "cross"),
    "weights of each head, batch first": ({"batch_first": True}, {"average_attn_weights": False}, "cross"),
    "cross": ({}, {"need_weights": False}, "cross"),
    "other values": ({"batch_first": True}, {}, "kv"),
    "separate": ({"kdim": 6, "vdim": 10}, {}, "kv"),
    "separate without bias": ({"kdim": 6, "vdim": 10, "bias": False}, {"need_weights": False}, "kv"),
    "padding": ({}, {"key_padding_mask": padding()}, "cross"),
    "padding, no weights": ({"batch_first": True}, {"key_padding_mask": padding(), "need_weights": False}, "cross"),
    "mask": ({}, {"attn_mask": triangle(L)}, "self"),
    "mask of each head": ({}, {"attn_mask": per_head()}, "cross"),
    "mask of each head, no weights": ({}, {"attn_mask": per_head(), "need_weights": False}, "cross"),
    "both masks": (
        {"batch_first": True},
        {"attn_mask": per_head(), "key_padding_mask": padding(), "need_weights": False},
        "cross",
    ),
    "causal": ({"batch_first": True}, {"attn_mask": triangle(L), "is_causal": True, "need_weights": False}, "self"),
    "causal with weights": ({}, {"attn_mask": triangle(L), "is_causal": True}, "self"),
    "causal with padding": (
        {},
        {
            "attn_mask": triangle(S),
            "is_causal": True,
            "key_padding_mask": padding(),
            "need_weights": False,
        },
        "long",
    ),
    "extra keys": (
        {"add_bias_kv": True, "add_zero_attn": True},
        {"attn_mask": per_head(), "key_padding_mask": padding()},
        "cross",
    ),
    "extra keys, no weights": (
        {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
        {"attn_mask": per_head(), "need_weights": False},
        "cross",
    ),
    "unbatched": ({}, {}, "flat"),
    "unbatched, masks": (
        {"batch_first": True},
        {"attn_mask": per_head(samples=1), "key_padding_mask": padding()[0], "average_attn_weights": False},
        "flat",
    ),
}


def attention_inputs(module: dict[str, Any], which: str) -> list[Tensor]:
    keys, values = module.get("kdim", E), module.get("vdim", E)
    if which == "flat":
        return tensors((L, E), (S, keys), (S, values))
    shapes = [(L, N, E), (S, N, keys), (S, N, values)]
    if which == "long":
        shapes = [(S, N, E)]
    if module.get("batch_first"):
        shapes = [(n, length, width) for length, n, width in shapes]
    return tensors(*shapes[: {"self": 1, "long": 1, "cross": 2}.get(which, 3)])


def attention_cases() -> dict[str, tuple[float, float]]:
    found = {}
    for name, (module, options, which) in ATTENTION.items():
        torch.manual_seed(1)

        def call(model: nn.Module, inputs: list[Tensor], options: dict[str, Any] = options) -> Any:
            query, key, value = [*inputs, *inputs[-1:] * (3 - len(inputs))]
            return model(query, key, value, **options)

        layer = nn.MultiheadAttention(E, HEADS, **module)
        found[name] = differences(layer, attention_inputs(module, which), call, TP2)
    return found


def assert_close(found: dict[str, tuple[float, float]]) -> None:
    for name, (outputs, gradients) in found.items():
        assert outputs < OUTPUTS and gradients < GRADIENTS, f"{name}: {outputs:.1e} {gradients:.1e}"


def test_attention_gives_what_one_process_gives(pools: Pools) -> None:
    for found in pools(2).run(attention_cases):
        assert found.keys() == ATTENTION.keys()
        assert_close(found)
