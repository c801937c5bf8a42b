"""What a MoE layer has seen, while its block runs a second time."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_ted.collectives.tape import Tape
from lightning_ted.moe import MoE, auxiliary_loss, expert_counts
from lightning_ted.recompute import CheckpointMode, RecomputeOptions, checkpoint_blocks


class Block(nn.Module):
    """Hands out its own auxiliary loss."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.moe = MoE(8, 8, 4, aux_loss_coef=1.0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.moe(self.linear(x).tanh()), auxiliary_loss(self)


class Model(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        first = Block()
        self.blocks = nn.ModuleList([first, first if tied else Block()])

    def forward(self, x: Tensor) -> Tensor:
        losses = []
        for block in self.blocks:
            x, loss = block(x)
            losses.append(loss)
        return x.square().mean() + torch.stack(losses).sum()


def batch(seed: int) -> Tensor:
    return torch.randn(50, 8, generator=torch.Generator().manual_seed(seed))


def one(model: Model) -> None:
    model(batch(0)).backward()


def two_forwards(model: Model) -> None:
    for loss in [model(batch(0)), model(batch(1))]:
        loss.backward()


def evaluated_between(model: Model) -> None:
    loss = model(batch(0))
    with torch.no_grad():
        model(batch(1))
    loss.backward()


@pytest.mark.parametrize("mode", ["full", "comm_aware"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("steps", [one, two_forwards, evaluated_between])
def test_a_block_that_adds_its_own_auxiliary_loss(
    steps: Callable[[Model], None], tied: bool, mode: CheckpointMode
) -> None:
    plain, recomputed = Model(tied), Model(tied)
    checkpoint_blocks(recomputed, RecomputeOptions(mode))
    for model in (plain, recomputed):
        steps(model)
    for (name, want), (_, got) in zip(plain.named_parameters(), recomputed.named_parameters(), strict=True):
        assert want.grad is not None and got.grad is not None
        assert torch.equal(want.grad, got.grad), name
    want_counts, got_counts = expert_counts(plain), expert_counts(recomputed)
    assert all(torch.equal(got_counts[name], counts) for name, counts in want_counts.items())


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("ends", ["backward", "nothing"])
def test_a_finished_step_leaves_the_numbers_and_no_graph(ends: str, score: str) -> None:
    model = nn.Sequential(*[nn.Sequential(MoE(8, 8, 4, score=score, z_loss_coef=0.1)) for _ in range(2)])  # type: ignore[arg-type]
    checkpoint_blocks(model, RecomputeOptions("comm_aware"))
    tapes: list[weakref.ref[Tape]] = []
    with pytest.MonkeyPatch.context() as patch:
        made = Tape.__init__
        patch.setattr(Tape, "__init__", lambda self, policy: (tapes.append(weakref.ref(self)), made(self, policy))[1])
        output = model(batch(0))
    loss = auxiliary_loss(model).item()
    for module in model.modules():
        if isinstance(module, MoE):
            module.end_step()
    gc.disable()
    try:
        if ends == "backward":
            output.sum().backward()
        del output
        assert len(tapes) == 2 and all(tape() is None for tape in tapes)
    finally:
        gc.enable()
    # For logging, behind the step.
    again = auxiliary_loss(model)
    assert again.item() == loss and not again.requires_grad
