from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_ted.errors import PlanError
from lightning_ted.mesh import Axis
from lightning_ted.tensor_parallel import expand_plan
from lightning_ted.tensor_parallel.apply import apply_plan, find_stacks

TWO = Axis("tensor", 2, 0)


class Block(nn.Sequential):
    """A block that is called, of an up and a down projection."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.Linear(4, 4))


def stacks(root: nn.Module, plan: dict[str, str]) -> dict[str, list[str]]:
    return find_stacks(root, expand_plan(root, plan))


BLOCK = {"*.0": "colwise", "*.1": "rowwise"}


def within(prefix: str) -> dict[str, str]:
    return {f"{prefix}.{pattern}": style for pattern, style in BLOCK.items()}


@pytest.mark.parametrize(
    ("root", "plan", "found"),
    [
        (nn.ModuleDict({"x": nn.ModuleList([Block(), Block()])}), within("x"), {"x": ["x.0", "x.1"]}),
        (nn.ModuleDict({"x": nn.Sequential(Block())}), within("x"), {"x": ["x.0"]}),
        # Blocks without layers of the plan may stand between others; what stands around them is no part of the stack.
        (
            nn.Sequential(nn.Embedding(4, 4), Block(), nn.Identity(), Block(), nn.Linear(4, 4)),
            {"1.0": "colwise", "1.1": "rowwise", "3.0": "colwise", "3.1": "rowwise", "4": "colwise_gather_output"},
            {"": ["1", "2", "3"]},
        ),
        (nn.ModuleDict({"x": nn.ModuleList([nn.Linear(4, 4)] * 2)}), {"x.*": "colwise_gather_output"}, {}),
        (nn.ModuleDict({"x": nn.ModuleList([nn.Embedding(4, 4)] * 2)}), {"x.*": "embedding_rowwise"}, {}),
        (nn.ModuleDict({"x": Block()}), {"x.0": "colwise", "x.1": "rowwise"}, {}),
        # One model of blocks in a sequence of other things: the stack is inside.
        (
            nn.Sequential(nn.Embedding(4, 4), nn.Sequential(Block(), Block()), nn.Linear(4, 4)),
            within("1"),
            {"1": ["1.0", "1.1"]},
        ),
        # Lists of lists are not called.
        (
            nn.ModuleList([nn.ModuleList([Block()]), nn.ModuleList([Block()])]),
            {"*.*.0": "colwise", "*.*.1": "rowwise"},
            {"0": ["0.0"], "1": ["1.0"]},
        ),
        # Networks in a list inside a block are a part of the block.
        (
            nn.ModuleList([nn.Sequential(nn.Sequential(Block(), Block())) for _ in range(2)]),
            {"*.0.*.0": "colwise", "*.0.*.1": "rowwise"},
            {"": ["0", "1"]},
        ),
    ],
)
def test_stacks_are_lists_of_blocks_with_both_kinds_of_layers(
    root: nn.Module, plan: dict[str, str], found: dict[str, list[str]]
) -> None:
    assert stacks(root, plan) == found


class Scaled(nn.Linear):
    def scale(self) -> float:
        return 2.0


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "'layer' makes its weight from other param"),
        (lambda: nn.utils.spectral_norm(nn.Linear(4, 4)), "'layer' makes its weight from other parameters"),
        (lambda: Scaled(4, 4), "'layer' fits a torch.nn.Linear itself, not a Scaled"),
        (lambda: nn.Conv1d(4, 4, 1), "'layer' fits a torch.nn.Linear itself, not a Conv1d"),
    ],
)
def test_layers_that_cannot_be_swapped_are_refused(layer: Callable[[], nn.Module], message: str) -> None:
    root = nn.ModuleDict({"layer": layer()})
    with pytest.raises(PlanError, match=message):
        apply_plan(root, expand_plan(root, {"layer": "colwise"}), TWO)


def test_loss_without_class_weights_is_accepted() -> None:
    root = nn.ModuleDict({"a": nn.CrossEntropyLoss(), "b": nn.CrossEntropyLoss(torch.ones(4))})
    assert apply_plan(root, expand_plan(root, {"*": "vocab_parallel_loss"}), TWO).cuts == {}
