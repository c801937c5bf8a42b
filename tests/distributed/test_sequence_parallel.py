"""Stacks of blocks whose activations are split over tokens: which they are, and what may happen in them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_ted.errors import PlanError, UnsupportedError
from lightning_ted.mesh import TEDMesh
from lightning_ted.strategy.partition import partition_module
from tests.support.models import TinyConfig, TinyDecoder
from tests.support.pool import Pools
from tests.support.reduced import reduced
from tests.support.stacks import SEQUENCE, TP2, Block, Stack, cut


def copied_before_and_after() -> bool:
    model = cut(TinyDecoder(TinyConfig()))
    tokens = torch.arange(16).view(2, 8)
    fresh = copy.deepcopy(model)
    same = torch.equal(fresh(tokens), model(tokens))
    used = copy.deepcopy(model)
    return same and torch.equal(used(tokens[:, :5]), model(tokens[:, :5]))


def test_copy_of_a_sequence_parallel_module_runs(pools: Pools) -> None:
    assert all(pools(2).run(copied_before_and_after))


class Embedded(nn.Module):
    """Lists that are no stacks: codebooks and heads."""

    tp_plan = {
        "books.*": "embedding_rowwise",
        "stack.blocks.*.up": "colwise",
        "stack.blocks.*.down": "rowwise",
        "heads.*": "colwise_gather_output",
    }

    def __init__(self) -> None:
        super().__init__()
        self.books = nn.ModuleList([nn.Embedding(12, 8), nn.Embedding(12, 8)])
        self.stack = Stack(Block(), Block())
        self.stack.tp_plan = {}
        self.heads = nn.ModuleList([nn.Linear(8, 12), nn.Linear(8, 12)])

    def forward(self, tokens: Tensor) -> list[Tensor]:
        x = self.stack(sum(book(tokens) for book in self.books))
        return [head(x) for head in self.heads]


def lists() -> tuple[float, list[str]]:
    torch.manual_seed(0)
    model = Embedded()
    whole = copy.deepcopy(model)
    layouts = partition_module(model, TEDMesh(TP2), SEQUENCE)
    tokens = torch.arange(14).view(2, 7) % 12
    error = max((a - b).abs().max().item() for a, b in zip(model(tokens), whole(tokens), strict=True))
    return error, [name for name, layout in layouts.items() if layout.family == "partial"]


def test_lists_of_heads_and_embeddings_are_no_stacks(pools: Pools) -> None:
    for error, partial in pools(2).run(lists):
        assert error < 1e-6
        assert partial == ["stack.blocks.0.down.bias", "stack.blocks.1.down.bias"]


class Changing(Block):
    """Changes its input in place, as a residual connection may."""

    def forward(self, x: Tensor) -> Tensor:
        x += 1
        return super().forward(x)


def changed_in_place(batch: int) -> bool:
    torch.manual_seed(0)
    model = Stack(Changing(), Changing())
    whole = copy.deepcopy(model)
    cut(model)
    x, leaf = torch.randn(batch, 7, 8), torch.zeros(8, requires_grad=True)
    y = model(x + leaf)
    y += 1
    y.sum().backward()
    return torch.allclose(y, whole(x.clone()) + 1, atol=1e-6) and leaf.grad is not None


@pytest.mark.parametrize("batch", [1, 2])
def test_split_and_joined_activations_may_be_changed_in_place(pools: Pools, batch: int) -> None:
    assert all(pools(2).run(changed_in_place, batch))


class Late(nn.Module):
    """Builds its blocks, or a part of them, in a second stage."""

    tp_plan = {"embedding": "embedding_rowwise", **Stack.tp_plan}

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        return Stack.forward(self, self.embedding(tokens))  # type: ignore[arg-type]


def stages() -> dict[str, Any]:
    mesh = TEDMesh(TP2)

    def staged(first: list[nn.Module], then: list[nn.Module]) -> str | bool:
        torch.manual_seed(0)
        model = Late()
        if first:
            model.blocks = nn.ModuleList(first)
        whole = copy.deepcopy(model)
        try:
            partition_module(model, mesh, SEQUENCE, complete=False)
            for each in (model, whole):
                each.blocks = nn.ModuleList([*getattr(each, "blocks", []), *copy.deepcopy(then)])
            layouts = partition_module(model, mesh, SEQUENCE)
            partition_module(model, mesh, SEQUENCE)
        except PlanError as error:
            return str(error)
        tokens = torch.arange(14).view(2, 7) % 12
        return layouts["blocks.0.down.bias"].family == "partial" and torch.allclose(model(tokens), whole(tokens))

    return {
        "late": staged([], [Block(), Block()]),
        "early": staged([Block(), Block()], []),
        "both": staged([Block(), Block()], [Block()]),
    }


def test_blocks_may_be_built_late_but_not_in_parts(pools: Pools) -> None:
    for found in pools(2).run(stages):
        assert found["late"] is True
        assert found["early"] is True
        assert "the blocks of 'blocks' were built in parts" in found["both"]


def refusals() -> list[str]:
    def attempt(run: Callable[[], object]) -> str:
        try:
            run()
        except (PlanError, UnsupportedError) as error:
            return str(error)
        return ""

    class Pair(Block):
        def forward(self, x: Tensor) -> Any:
            return [super().forward(x)]

    shared = Block()
    return [
        attempt(lambda: cut(nn.Linear(8, 8))),
        attempt(lambda: cut(Stack(shared, Block(), shared))),
        attempt(lambda: cut(Stack(Block(), Pair()))(torch.ones(2, 6, 8))),
        attempt(lambda: cut(Stack(Block()))(torch.ones(2, 6, 8).long())),
    ]


def test_what_cannot_be_split_is_refused(pools: Pools) -> None:
    for empty, repeated, output, tokens in pools(2).run(refusals):
        assert "`sequence_parallel=True` found no nn.ModuleList or nn.Sequential of blocks" in empty
        assert "'blocks' holds a block twice among others" in repeated
        assert "return, alone or first in a tuple, not a list" in output
        assert "as first positional argument of the blocks of 'blocks'" in tokens


def one_block_for_all() -> float:
    torch.manual_seed(0)
    block = Block()
    model = Stack(block, block, block)
    whole = copy.deepcopy(model)
    cut(model)
    x = torch.randn(2, 7, 8)
    return (model(x) - whole(x)).abs().max().item()


def test_one_block_may_be_used_for_the_whole_stack(pools: Pools) -> None:
    assert max(pools(2).run(one_block_for_all)) < 1e-6


class Splitting(Block):
    """Whole features between its layers, or a row-parallel layer that splits its input's features itself."""

    between = True

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.norm(self.up(x) if self.between else x).tanh())


def whole_features(between: bool, length: int) -> float:
    """Largest difference of the outputs and gradients from one process."""
    torch.manual_seed(0)
    whole = Stack(Splitting(), Splitting())
    for block in whole.blocks:
        block.between = between
    whole.tp_plan = {"blocks.*.up": "colwise_gather_output", "blocks.*.down": "rowwise_split_input"}
    model, mesh = copy.deepcopy(whole), TEDMesh(TP2)
    layouts = partition_module(model, mesh, SEQUENCE)
    x = torch.randn(2, length, 8)
    expected = whole(x)
    expected.square().sum().backward()
    with reduced(model, mesh, layouts, SEQUENCE) as gradients:
        output = model(x)
        output.square().sum().backward()
    worst = (output - expected).abs().max().item()
    for name, theirs in whole.named_parameters():
        if theirs.grad is not None:
            worst = max(worst, (gradients[name] - theirs.grad).abs().max().item() / theirs.grad.abs().max().item())
    return worst


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("between", [True, False])
def test_whole_features_in_a_stack_equal_one_process(pools: Pools, between: bool, length: int) -> None:
    assert max(pools(2).run(whole_features, between, length)) < 1e-6


class Recomputed(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def mixed_lengths() -> str:
    model = cut(Recomputed(Block(), Block()))
    for length in (7, 6):  # one after the other is fine
        model(torch.ones(2, length, 8, requires_grad=True)).sum().backward()
    # The second rank has three tokens of either length; it would wait for the first, which has one too many.
    first, second = (model(torch.ones(2, length, 8, requires_grad=True)) for length in (7, 6))
    try:
        (first.sum() + second.sum()).backward()
    except UnsupportedError as error:
        return str(error)
    return ""


def test_lengths_that_checkpoints_mix_up_are_refused_on_every_rank(pools: Pools) -> None:
    for message in pools(2).run(mixed_lengths):
        assert "do not run two forwards of different lengths before a backward" in message
