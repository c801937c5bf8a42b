"""torch's own attention, its heads shared out, computes what one process computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ted.collectives.recorder import CommRecorder
from lightning_ted.errors import PlanError, UnsupportedError
from lightning_ted.mesh import TEDMesh
from lightning_ted.strategy.partition import PartitionOptions, partition_module
from lightning_ted.tensor_parallel.attention import HeadParallelAttention
from tests.support.pool import Pools
from tests.support.stacks import TP2
from tests.support.torch_layers import (
    HEADS,
    E,
    Holder,
    N,
    S,
    T,
    assert_close,
    differences,
    padding,
    per_head,
    tensors,
    triangle,
)

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
    "mask": ({}, {"attn_mask": triangle(T)}, "self"),
    "mask of each head": ({}, {"attn_mask": per_head()}, "cross"),
    "mask of each head, no weights": ({}, {"attn_mask": per_head(), "need_weights": False}, "cross"),
    "both masks": (
        {"batch_first": True},
        {"attn_mask": per_head(), "key_padding_mask": padding(), "need_weights": False},
        "cross",
    ),
    "causal": ({"batch_first": True}, {"attn_mask": triangle(T), "is_causal": True, "need_weights": False}, "self"),
    "causal with weights": ({}, {"attn_mask": triangle(T), "is_causal": True}, "self"),
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
        return tensors((T, E), (S, keys), (S, values))
    shapes = [(T, N, E), (S, N, keys), (S, N, values)]
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


def test_attention_gives_what_one_process_gives(pools: Pools) -> None:
    for found in pools(2).run(attention_cases):
        assert found.keys() == ATTENTION.keys()
        assert_close(found)


def learned_masks() -> dict[str, tuple[float, float]]:
    """Masks that are added to scores are inputs with gradients."""
    found = {}
    for name, shape in {"of all heads": (T, S), "of each head": (N * HEADS, T, S)}.items():
        for need_weights in (False, True):

            def call(model: nn.Module, inputs: list[Tensor], need_weights: bool = need_weights) -> Any:
                query, memory, mask, padded = inputs
                return model(query, memory, memory, attn_mask=mask, key_padding_mask=padded, need_weights=need_weights)

            torch.manual_seed(1)
            inputs = tensors((T, N, E), (S, N, E), shape, (N, S))
            found[f"{name}, {need_weights}"] = differences(nn.MultiheadAttention(E, HEADS), inputs, call, TP2)
    return found


def test_learned_masks_get_the_gradient_of_all_heads(pools: Pools) -> None:
    for found in pools(2).run(learned_masks):
        assert_close(found)


def traffic() -> dict[tuple[str, str], int]:
    mesh = TEDMesh(TP2)
    model = Holder(nn.MultiheadAttention(E, HEADS))
    partition_module(model, mesh, PartitionOptions())
    (x,) = tensors((T, N, E))
    x.requires_grad_()
    with mesh.recording(CommRecorder()) as recorder:
        model(x, x, x, need_weights=False)[0].sum().backward()
    return dict(recorder.calls)


def test_one_tensor_as_query_key_and_value_is_handed_over_once(pools: Pools) -> None:
    for calls in pools(2).run(traffic):
        assert calls == {("all_reduce", "tensor"): 2}  # one forward, one backward


def dropped() -> tuple[float, list[bool], list[bool], float]:
    """Share of weights that dropout drops, where, the zeros of a layer's output, and a number drawn after all."""
    mesh = TEDMesh(TP2)
    torch.manual_seed(6)
    model = Holder(nn.MultiheadAttention(E, HEADS, dropout=0.4))
    partition_module(model, mesh, PartitionOptions())
    (x,) = tensors((30, 8, E))
    _, weights = model(x, x, x, average_attn_weights=False)
    own = weights.chunk(2, 1)[mesh.rank] == 0
    layer = Holder(nn.TransformerEncoderLayer(E, HEADS, 32, dropout=0.4, norm_first=True))
    with torch.no_grad():  # what is left is the dropout of what the layer adds
        layer.layer.linear2.weight.zero_()
        layer.layer.linear2.bias.fill_(1)
        layer.layer.self_attn.out_proj.weight.zero_()
        layer.layer.self_attn.out_proj.bias.fill_(10)
    partition_module(layer, mesh, PartitionOptions())
    added = (layer(x) - x).round().flatten()
    model.eval()
    _, kept = model(x, x, x, average_attn_weights=False)
    assert (kept > 0).all(), "nothing is dropped in evaluation"
    model.train()
    with pytest.raises(ValueError, match="where \\(30, 30\\) is wanted"):
        model(x, x, x, attn_mask=torch.zeros(30, 1))  # ends before the output projection
    return own.double().mean().item(), own.flatten().tolist(), added.tolist(), torch.rand(1).item()


def test_dropout_differs_between_heads_and_agrees_on_replicated_tensors(pools: Pools) -> None:
    (share, own, added, after), (other_share, others, other_added, other_after) = pools(2).run(dropped)
    # 4 heads / 2 x 8 samples x 30 x 30: three standard deviations are 0.012
    assert abs(share - 0.4) < 0.012 and abs(other_share - 0.4) < 0.012
    agreeing = sum(a == b for a, b in zip(own, others, strict=True)) / len(own)
    assert abs(agreeing - (0.4**2 + 0.6**2)) < 0.012, "ranks draw independently"
    assert added == other_added and len(set(added)) == 4  # neither, either or both are dropped
    assert after == other_after, "the common stream goes on the same"


class Block(nn.Module):
    def __init__(self, masked: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, HEADS)
        self.mask = nn.Parameter(torch.zeros(S, S)) if masked else None

    def forward(self, x: Tensor) -> Tensor:
        other = x if self.mask is not None else x + 1
        return x + self.attention(x, other, other, attn_mask=self.mask)[0]


def refusals() -> dict[str, str]:
    attention = Holder(nn.MultiheadAttention(E, HEADS))
    partition_module(attention, TEDMesh(TP2), PartitionOptions())
    assert isinstance(attention.layer, HeadParallelAttention) and attention.layer.num_heads == HEADS
    split = PartitionOptions(sequence_parallel=True)
    stacks = [nn.Sequential(Block(masked), Block(masked)) for masked in (False, True)]
    for stack in stacks:
        partition_module(stack, TEDMesh(TP2), split)
    (x,) = tensors((S, N, E))
    nested = torch.nested.nested_tensor([x[:, 0], x[:4, 1]])
    attempts: dict[str, Callable[[], Any]] = {
        "mask": lambda: attention(x, x, x, attn_mask=torch.zeros(S, S - 1)),
        "mask of each head": lambda: attention(x, x, x, attn_mask=torch.zeros(N * HEADS // 2, S, S)),
        "padding": lambda: attention(x, x, x, key_padding_mask=torch.zeros(S, N)),
        "dtype": lambda: attention(x, x, x, attn_mask=torch.zeros(S, S, dtype=torch.int64)),
        "causal": lambda: attention(x, x, x, is_causal=True),
        "dimensions": lambda: attention(x[0, 0], x, x),
        "nested": lambda: attention(nested, nested, nested),
        "cross": lambda: stacks[0](x),
        "learned": lambda: stacks[1](x),
        "subclass": lambda: partition_module(
            Holder(type("Own", (nn.MultiheadAttention,), {})(E, HEADS)),
            TEDMesh(TP2),
            PartitionOptions({"layer": "multihead_attention"}),
        ),
        "parameter": lambda: partition_module(
            Holder(nn.MultiheadAttention(E, HEADS)), TEDMesh(TP2), PartitionOptions({"layer.in_proj_weight": "colwise"})
        ),
    }
    said = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            said[name] = ""
        except (ValueError, UnsupportedError, PlanError) as error:
            said[name] = str(error)
    return said


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_what_cut_attention_does_not_take_is_refused_by_name(pools: Pools) -> None:
    for said in pools(2).run(refusals):
        assert said["mask"] == "`attn_mask` has the shape (6, 5), where (6, 6) is wanted."
        assert said["mask of each head"] == "`attn_mask` has the shape (4, 6, 6), where (8, 6, 6) is wanted."
        assert said["padding"] == "`key_padding_mask` has the shape (6, 2), where (2, 6) is wanted."
        assert said["dtype"] == "`attn_mask` must be of bool or of a floating-point dtype, not torch.int64."
        assert "`is_causal=True` is a hint about `attn_mask`, which is None" in said["causal"]
        assert "must all have 3 dimensions, or 2 without a batch, not 1, 3 and 3" in said["dimensions"]
        assert "takes no nested tensors" in said["nested"]
        assert "only with one tensor as `query`, `key` and `value`" in said["cross"]
        assert "a mask in '' requires a gradient" in said["learned"]
        assert "fits a torch.nn.MultiheadAttention itself, not a Own" in said["subclass"]
        assert "is a parameter, which the style 'colwise' does not fit; name its module" in said["parameter"]
