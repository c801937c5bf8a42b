"""Random numbers on shards, on split tokens and on replicated tensors, however a forward ends or is repeated."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_ted.mesh import TEDMesh
from lightning_ted.strategy.partition import PartitionOptions, partition_module
from tests.support.models import TinyConfig, TinyDecoder
from tests.support.pool import Pools
from tests.support.runs import Toy, loader, trainer
from tests.support.stacks import TP2, Block, Stack, cut


def dropout_masks() -> dict[str, tuple[list[bool], list[bool]]]:
    """Zeros of the attention weights' (sharded) and the residual's (replicated) dropout, twice from one random state."""
    torch.manual_seed(7)
    mesh = TEDMesh(TP2)
    model = TinyDecoder(TinyConfig(dropout=0.5))
    partition_module(model, mesh, PartitionOptions())
    found: dict[str, list[list[bool]]] = {"sharded": [], "replicated": []}
    original = F.dropout

    def spy(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        mask = original(torch.ones_like(x), p, training)
        found["sharded" if x.dim() == 4 else "replicated"].append((mask == 0).flatten().tolist())
        return x * mask

    F.dropout = spy  # type: ignore[assignment]
    try:
        state = torch.get_rng_state()
        for _ in range(2):
            torch.set_rng_state(state)
            model.blocks[0](torch.ones(2, 6, 16))
    finally:
        F.dropout = original  # type: ignore[assignment]
    after = torch.rand(1).item()
    half = len(found["sharded"]) // 2
    assert found["sharded"][:half] == found["sharded"][half:], "the same state gives the same masks"
    return {"sharded": found["sharded"][0], "replicated": found["replicated"][0], "after": after}  # type: ignore[dict-item]


def test_dropout_agrees_on_replicated_tensors_and_differs_on_shards(pools: Pools) -> None:
    first, second = pools(2).run(dropout_masks)
    assert first["sharded"] != second["sharded"]
    assert first["replicated"] == second["replicated"]
    assert first["after"] == second["after"], "the common stream goes on the same"


class Checkpointed(TinyDecoder):
    recompute = False

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.head(self.norm(x))


def gradients_of_three_steps(sequence: bool, length: int) -> bool:
    """Whether they are the same with and without checkpointing."""
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = cut(Checkpointed(TinyConfig(dropout=0.3)), PartitionOptions(sequence_parallel=sequence))
        model.recompute = recompute
        torch.manual_seed(1)
        for _ in range(3):
            model.step(torch.arange(2 * length).view(2, length))[1].backward()
        found.append([parameter.grad for parameter in model.parameters()] + [torch.rand(1)])
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("length", [7, 8])
@pytest.mark.parametrize("sequence", [False, True])
def test_dropout_under_checkpointing_gives_the_same_gradients(pools: Pools, sequence: bool, length: int) -> None:
    assert all(pools(2).run(gradients_of_three_steps, sequence, length))


class Skipping(Block):
    """Stochastic depth, and dropout as a function: on an odd number of tokens, ranks draw differently many numbers."""

    dropped: list[bool]

    def __init__(self) -> None:
        super().__init__()
        self.layer_drop = 0.5
        self.module = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        self.dropped.append(torch.rand(()).item() < self.layer_drop)
        return x if self.dropped[-1] else super().forward(self.module(F.dropout(x, 0.5, self.training)))


def skips() -> tuple[list[bool], float]:
    model = cut(Stack(*(Skipping() for _ in range(12))))
    dropped: list[bool] = []
    for block in model.blocks:
        block.dropped = dropped
    model(torch.ones(2, 7, 8)).sum().backward()
    return dropped, torch.rand(()).item()


def test_stochastic_depth_skips_the_same_blocks_on_all_ranks(pools: Pools) -> None:
    first, second = pools(2).run(skips)
    assert first == second
    assert 0 < sum(first[0]) < 12


class Recording(Block):
    """Notes the masks of its dropout module, on split tokens and on split features."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.masks: list[list[bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        for layer in (lambda x: x, self.up):
            x = layer(x)
            mask = self.dropout(torch.ones_like(x))
            self.masks.append((mask == 0).flatten().tolist())
            x = x * mask
        # As a function between the layers: its numbers are this rank's own as well.
        self.masks.append((F.dropout(torch.ones_like(x)) == 0).flatten().tolist())
        return self.down(x)


def masks() -> tuple[list[list[bool]], float]:
    model = cut(Stack(Recording(), Recording()))
    model(torch.ones(2, 8, 8))
    return [mask for block in model.blocks for mask in block.masks], torch.rand(()).item()


def test_dropout_differs_on_split_tokens_and_split_features(pools: Pools) -> None:
    (first, after), (second, same) = pools(2).run(masks)
    assert after == same, "the common stream goes on the same"
    assert len(first) == 6 and all(a != b for a, b in zip(first, second, strict=True))


class Fragile(Block):
    """Raises between its layers when told to."""

    broken = False

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(self.up(self.dropout(x)))
        if self.broken:
            raise RuntimeError("broken")
        return x + self.down(hidden)


class Listed(nn.Module):
    """Its layers are in a list, which nobody calls."""

    tp_plan = {"layers.0": "colwise", "layers.1": "rowwise"}
    broken = False

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(0.3)])

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layers[2](self.layers[0](x))
        if self.broken:
            raise RuntimeError("broken")
        return self.layers[1](hidden)


def after_an_exception(build: Callable[[], nn.Module], options: PartitionOptions) -> tuple[bool, float]:
    """Whether a step after one that raised is that of a fresh module; and a number of the common stream."""
    found = []
    for breaks in (False, True):
        torch.manual_seed(0)
        model = cut(build(), options)
        part: Any = model.blocks[0] if isinstance(model, Stack) else model
        x = torch.ones(2, 7, 8)
        if breaks:
            part.broken = True
            with pytest.raises(RuntimeError, match="broken"):
                model(x)
            part.broken = False
        number = torch.rand(()).item()
        torch.manual_seed(1)
        model(x).sum().backward()
        found.append([parameter.grad for parameter in model.parameters()] + [torch.rand(1)])
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True)), number


def fragile_stack() -> nn.Module:
    return Stack(Fragile(), Fragile())


@pytest.mark.parametrize(
    ("build", "sequence"),
    [(fragile_stack, True), (fragile_stack, False), (Listed, False)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_an_exception_leaves_nothing_switched(pools: Pools, build: Callable[[], nn.Module], sequence: bool) -> None:
    (same, number), (other_same, other_number) = pools(2).run(
        after_an_exception, build, PartitionOptions(sequence_parallel=sequence)
    )
    assert same and other_same
    assert number == other_number, "the common stream is in use again"


class Partly(nn.Module):
    """Checkpoints a part of its forward, so that the recomputation stops early, outside any forward."""

    tp_plan = {"up": "colwise", "down": "rowwise"}

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(0.5)
        self.recompute = recompute

    def part(self, x: Tensor) -> Tensor:
        return self.dropout(self.up(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(checkpoint(self.part, x, use_reentrant=False) if self.recompute else self.part(x))


def partly_checkpointed() -> bool:
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = cut(Partly(recompute), PartitionOptions())
        for _ in range(3):
            model(torch.ones(2, 8)).square().sum().backward()
        found.append([parameter.grad for parameter in model.parameters()] + [torch.rand(1)])
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_recomputation_of_a_part_of_a_region_leaves_nothing_behind(pools: Pools) -> None:
    assert all(pools(2).run(partly_checkpointed))


class Nested(nn.Module):
    """Its column- and row-parallel layers have different parents, as in BERT and ViT; dropout is between them."""

    tp_plan = {"self.query": "colwise", "self.key": "colwise", "output.dense": "rowwise"}

    def __init__(self) -> None:
        super().__init__()
        self.self = nn.ModuleDict({"query": nn.Linear(8, 8), "key": nn.Linear(8, 8), "dropout": nn.Dropout(0.5)})
        self.output = nn.ModuleDict({"dense": nn.Linear(8, 8)})
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> list[list[bool]]:
        y = self.self["query"](x) + self.self["key"](x)
        split = self.self["dropout"](torch.ones_like(y))
        whole = self.dropout(torch.ones_like(self.output["dense"](y)))
        return [(mask == 0).flatten().tolist() for mask in (split, whole)]


def nested_masks() -> tuple[list[list[bool]], float]:
    masks = cut(Nested(), PartitionOptions())(torch.ones(4, 8))
    return masks, torch.rand(()).item()


def test_dropout_differs_on_shards_between_layers_of_different_parents(pools: Pools) -> None:
    ((split, whole), after), ((other_split, other_whole), other_after) = pools(2).run(nested_masks)
    assert split != other_split
    assert whole == other_whole and after == other_after, "the row-parallel layer ends it"


class Direct(Toy):
    """Layers that hang on the LightningModule itself, whose forward no step calls; the first one's output is a loss."""

    tp_plan = {"up": "colwise", "gate": "colwise", "down": "rowwise"}

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = (nn.Linear(8, 8) for _ in range(3))
        self.dropout = nn.Dropout(0.5)
        self.inputs: list[weakref.ref[Tensor]] = []
        self.numbers: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = self.net(batch[0]).expand(-1, 8) * 1
        self.inputs.append(weakref.ref(x))
        return self.up(x).square().mean()  # returns early: neither its sibling nor the row-parallel layer is called

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.numbers.append(torch.rand(()).item())


def left_open() -> tuple[list[float], int]:
    module, run = Direct(), trainer("tp2", max_epochs=1, limit_train_batches=2)
    torch.manual_seed(3)
    run.fit(module, loader())
    return [*module.numbers, torch.rand(()).item()], sum(ref() is not None for ref in module.inputs)


def test_a_step_that_returns_early_leaves_nothing_switched_or_kept(pools: Pools) -> None:
    (first, kept), (second, other_kept) = pools(2).run(left_open)
    assert first == second, "the common stream is in use again"
    assert kept == other_kept == 0, "no input and no graph is kept"
