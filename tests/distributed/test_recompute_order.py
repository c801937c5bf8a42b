"""What recomputation must not depend on: the order of events, and what a block does."""

from __future__ import annotations

import gc
import time
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ted.collectives import primitives, tape
from lightning_ted.collectives.phase import current_phase
from lightning_ted.collectives.recorder import CommRecorder
from lightning_ted.mesh import TEDMesh
from lightning_ted.moe import MoE, auxiliary_loss, expert_counts
from lightning_ted.recompute import RecomputeOptions, checkpoint_blocks
from lightning_ted.strategy.partition import PartitionOptions, partition_module
from lightning_ted.topology import Topology
from tests.distributed.test_recompute import ALL, DTD, FULL, ROWS, SEQUENCE, Counts, decoder, gradients
from tests.support.models import TinyConfig, TinyDecoder
from tests.support.pool import Pools
from tests.support.stacks import TP2, Block, Stack


def tokens_of(mesh: TEDMesh, length: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(10 * seed + mesh.axis("data").rank)
    return torch.randint(24, (3, length), generator=generator)


def in_order(model: TinyDecoder, mesh: TEDMesh) -> None:
    for seed in range(2):
        model.step(tokens_of(mesh, seed=seed))[1].backward()


def reversed_order(model: TinyDecoder, mesh: TEDMesh) -> None:
    first, second = (model.step(tokens_of(mesh, length, length))[1] for length in (8, 5))
    second.backward()
    first.backward()


def same_order(model: TinyDecoder, mesh: TEDMesh) -> None:
    first, second = (model.step(tokens_of(mesh, length, length))[1] for length in (8, 5))
    counts = expert_counts(model)
    first.backward()
    # Those of the last forward, not of the last recomputation.
    assert torch.equal(expert_counts(model)["blocks.1.ffn"], counts["blocks.1.ffn"])
    second.backward()


def with_evaluations(model: TinyDecoder, mesh: TEDMesh) -> None:
    loss = model.step(tokens_of(mesh))[1]
    with torch.no_grad():
        model(tokens_of(mesh, 6, 1))
    with torch.inference_mode():
        model.eval()(tokens_of(mesh, 7, 2))
    model.train()
    loss.backward()


def with_an_exception(model: TinyDecoder, mesh: TEDMesh) -> None:
    loss = model.step(tokens_of(mesh))[1]

    def fail(*_: Any) -> None:
        raise KeyError("in the middle of a block")

    handle = model.blocks[1].norm2.register_forward_hook(fail)
    with pytest.raises(KeyError):
        model.step(tokens_of(mesh, 6, 1))
    with suppress(KeyError):  # within the recomputation
        loss.backward()
    handle.remove()
    assert not tape._running and current_phase() == "forward"
    model.zero_grad()
    model.step(tokens_of(mesh))[1].backward()


def without_a_backward(model: TinyDecoder, mesh: TEDMesh) -> None:
    model.step(tokens_of(mesh, 6, 1))
    model.step(tokens_of(mesh))[1].backward()


def after_a_changed_weight(model: TinyDecoder, mesh: TEDMesh) -> None:
    # What the original would have replayed here belongs to other weights.
    model.step(tokens_of(mesh))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    model.step(tokens_of(mesh))[1].backward()


def twice(model: TinyDecoder, mesh: TEDMesh) -> None:
    loss = model.step(tokens_of(mesh))[1]
    loss.backward(retain_graph=True)
    loss.backward()


def two_losses(model: TinyDecoder, mesh: TEDMesh) -> None:
    logits, _ = model.step(tokens_of(mesh))
    logits.square().mean().backward(retain_graph=True)
    auxiliary_loss(model).backward()


def by_autograd_grad(model: TinyDecoder, mesh: TEDMesh) -> None:
    loss = model.step(tokens_of(mesh))[1]
    parameters = list(model.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient


def in_eval_mode(model: TinyDecoder, mesh: TEDMesh) -> None:
    model.eval().step(tokens_of(mesh))[1].backward()


ORDERS: list[Callable[[TinyDecoder, TEDMesh], None]] = [
    in_order,
    reversed_order,
    same_order,
    with_evaluations,
    with_an_exception,
    without_a_backward,
    after_a_changed_weight,
    twice,
    two_losses,
    by_autograd_grad,
    in_eval_mode,
]


def orders(options: PartitionOptions) -> dict[str, list[bool]]:
    """For each order of events, whether gradients are those of a model that is not recomputed."""
    mesh = TEDMesh(Topology(2, 2, 2, 1))
    found: dict[str, list[bool]] = {}
    for order in ORDERS:
        for recompute in (None, FULL, ALL, ROWS):
            model = decoder(mesh, options, recompute, TinyConfig(dropout=0.2))
            torch.manual_seed(6)
            with mesh.recording(CommRecorder()) as recorder:
                order(model, mesh)
            if recompute is None:
                want = gradients(model)
                continue
            again = any(key.phase == "recomputation" for key in recorder.calls_by)
            equal = all(torch.equal(gradient, want[name]) for name, gradient in gradients(model).items())
            found.setdefault(order.__name__, []).append(equal and again == (recompute is not ALL))
    return found


@pytest.mark.parametrize("options", [DTD, SEQUENCE], ids=["dropped", "sequence"])
def test_the_order_of_forwards_and_backwards_does_not_matter(pools: Pools, options: PartitionOptions) -> None:
    for rank in pools(2).run(orders, options):
        assert rank == {order.__name__: [True, True, True] for order in ORDERS}


def vanish(kept: list[weakref.ref[Tensor]]) -> bool:
    """Whether all go by themselves: gloo's threads let go of the last operation's tensors a little after it has ended."""
    deadline = time.monotonic() + 10
    while any(ref() is not None for ref in kept) and time.monotonic() < deadline:
        time.sleep(0.01)
    return all(ref() is None for ref in kept)


def freed() -> list[bool]:
    mesh = TEDMesh(Topology(2, 2, 2, 1))
    model = decoder(mesh, DTD, ALL, TinyConfig())
    kept: list[weakref.ref[Tensor]] = []
    add = tape.Tape.add

    def watched(self: tape.Tape, key: Any, value: Any) -> None:
        add(self, key, value)
        kept.extend(weakref.ref(v) for _, v, _ in self.entries[-1:] if isinstance(v, Tensor))

    gone = []
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tape.Tape, "add", watched)
            for ending in ("backward", "backward without auxiliary loss", "nothing"):
                kept.clear()
                logits, loss = model.step(tokens_of(mesh))
                model.blocks[1].ffn.end_step()
                held = bool(kept) and all(ref() is not None for ref in kept)
                if ending == "backward":
                    loss.backward()
                elif ending != "nothing":
                    del loss
                    logits.sum().backward()
                logits = loss = None  # type: ignore[assignment]
                gone.append(held and vanish(kept))
    finally:
        gc.enable()
    return gone


def test_what_is_kept_goes_with_its_graph(pools: Pools) -> None:
    for rank in pools(2).run(freed):
        assert rank == [True, True, True]


# -- blocks of all sorts ---------------------------------------------------------------------------------------------------


class Plain(Block):
    """A block without a bias after its last layer, so that what it returns is the outcome of a collective itself."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(8, 8, bias=False)


class InPlace(Plain):
    def forward(self, x: Tensor) -> Tensor:
        h = self.down(self.up(x).relu())
        h += x
        return h


class Structured(Plain):
    """Keyword arguments, others than tensors, and a dict in a tuple."""

    def forward(self, x: Tensor, *, options: dict[str, Any], debug: bool, context_fn: Tensor) -> Any:
        h = self.down(self.up(x * context_fn).relu()) * options["scale"]
        return (h if debug else x, {"h": h * options["scale"]})


class Inward(Plain):
    """Takes a gradient in its forward, of a part that communicates."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            energy = self.down(self.up(point).tanh()).square().sum()
            (force,) = torch.autograd.grad(energy, point)
        return x + force + self.down(self.up(x).tanh())


class Forgetful(Plain):
    """Does not do the same twice."""

    runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.down(self.up(x if self.runs == 1 else x[:2]))


def stack(*blocks: nn.Module, recompute: RecomputeOptions | None, names: Any = None) -> tuple[Stack, TEDMesh]:
    mesh, model = TEDMesh(TP2), Stack(*blocks)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    partition_module(model, mesh, DTD)
    checkpoint_blocks(model, recompute, names)
    return model, mesh


def sorts(kind: type[Block], recompute: RecomputeOptions | None) -> tuple[list[Tensor], dict[str, int], list[str]]:
    """Gradients of two blocks of a kind and of their input, calls of the recomputation by kind, and warnings."""
    model, mesh = stack(kind(), kind(), recompute=recompute)
    x = torch.linspace(-1, 1, 24).view(3, 8)
    if kind is not Inward:
        x.requires_grad_()
    with pytest.MonkeyPatch.context() as patch, mesh.recording(CommRecorder()) as recorder:
        said: list[str] = []
        patch.setattr(tape.warnings, "warn", lambda text, **_: said.append(text))
        if kind is Structured:
            h, more = x, {}
            for block in model.blocks:
                h, more = block(h, options={"scale": 0.5}, debug=True, context_fn=torch.full((8,), 2.0))
            output = h + more["h"]
        else:
            output = model(x)
        output.square().sum().backward()
    calls = Counter[str]()
    for key, count in recorder.calls_by.items():
        calls[key.kind] += count if key.phase == "recomputation" else 0
    return [p.grad for p in (*model.parameters(), x) if p.grad is not None], dict(+calls), said


@pytest.mark.parametrize("kind", [Block, Plain, InPlace, Structured, Inward])
def test_blocks_of_all_sorts(pools: Pools, kind: type[Block]) -> None:
    want = pools(2).run(sorts, kind, None)
    for recompute in (FULL, ALL):
        for (got, calls, said), (expected, _, _) in zip(pools(2).run(sorts, kind, recompute), want, strict=True):
            assert len(got) == len(expected) and all(map(torch.equal, got, expected))
            if recompute is FULL:
                assert calls["all_reduce"] >= 2
            elif kind is InPlace:
                # What the block has changed has to be made anew.
                assert calls == {"all_reduce": 2}
                assert len(said) == 2 and "outcome of an all-reduce was changed in place" in said[0]
            else:
                assert calls == {}
            assert said == [] or kind is InPlace


def forgetful(recompute: RecomputeOptions) -> str:
    model, _ = stack(Forgetful(), Forgetful(), recompute=recompute)
    loss = model(torch.ones(3, 8)).sum()
    try:
        loss.backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "silent"


def test_a_block_that_does_something_else_again_is_found_out(pools: Pools) -> None:
    for said in pools(2).run(forgetful, ALL):
        assert said.startswith(
            "RecomputationError: The recomputation of a checkpointed region asks for ('all_reduce', 'tensor'"
        )
        assert "`activation_checkpointing_policy`" in said
    for said in pools(2).run(forgetful, FULL):
        assert said.startswith("CheckpointError")


def nested(recompute: RecomputeOptions | None) -> tuple[list[Tensor], int, Counts]:
    model, mesh = stack(Plain(), Plain(), recompute=recompute, names=["Plain", "Linear"])
    outer = nn.Sequential(model)
    checkpoint_blocks(outer, recompute, ["Stack", "Plain", "RowParallelLinear"])
    x = torch.linspace(-1, 1, 24).view(3, 8)
    with mesh.recording(CommRecorder()) as recorder:
        loss = outer(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    again = sum(count for key, count in recorder.calls_by.items() if key.phase == "recomputation")
    return [p.grad for p in model.parameters()], again, dict(recorder.kept)


def test_regions_may_be_nested(pools: Pools) -> None:
    want = pools(2).run(nested, None)
    for recompute in (FULL, ALL):
        for (got, again, kept), (expected, _, _) in zip(pools(2).run(nested, recompute), want, strict=True):
            assert all(map(torch.equal, got, expected))
            assert (again == 0) == (recompute is ALL)
            # Two sums of 24 numbers, however many regions keep them.
            assert kept == ({("all_reduce", "tensor"): 2 * 24 * 4} if recompute is ALL else {})


def own_collective() -> tuple[bool, bool]:
    """A capacity that is not divided evenly, and a shared expert, in a region that is one MoE layer."""
    mesh = TEDMesh(Topology(2, 2, 2, 1))
    found = []
    for recompute in (None, ALL):
        torch.manual_seed(1)
        layer = nn.Sequential(MoE(8, 8, 4, capacity_factor=0.7, shared_expert=nn.Linear(8, 8)))
        partition_module(layer, mesh, DTD)
        checkpoint_blocks(layer, recompute, ["MoE"])
        with mesh.recording(CommRecorder()) as recorder:
            (layer(torch.linspace(-1, 1, 40).view(5, 8)).sum() + auxiliary_loss(layer)).backward()
        found.append(gradients(layer))
        again = any(key.phase == "recomputation" for key in recorder.calls_by)
    return all(torch.equal(found[1][name], gradient) for name, gradient in found[0].items()), again


def test_a_moe_layer_may_be_a_region_itself(pools: Pools) -> None:
    assert pools(2).run(own_collective) == [(True, False)] * 2


def outside_of_regions() -> bool:
    """Collectives outside of regions keep nothing."""
    mesh = TEDMesh(TP2)
    made = tape.Tape("all")
    with made.recording():
        primitives.all_reduce(torch.ones(2), mesh.axis("tensor"))
    primitives.all_reduce(torch.ones(3), mesh.axis("tensor"))
    with made.replaying():
        same = primitives.all_reduce(torch.ones(2), mesh.axis("tensor"))
    return len(made.entries) == 1 and torch.equal(same, torch.full((2,), 2.0))


def test_a_tape_takes_what_its_region_does(pools: Pools) -> None:
    assert pools(2).run(outside_of_regions) == [True, True]
