"""From the strategy's arguments to a topology: what a plan and the experts allow, before any process starts."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from lightning_ted.errors import LayoutError, PlanError
from lightning_ted.moe import MoE
from lightning_ted.strategy.sizes import resolve_sizes
from lightning_ted.topology import Topology

PLAN = {
    "embedding": "embedding_rowwise",
    "q": "colwise",
    "qkv": "packed_colwise:8,4,4",
    "gate_up": "packed_colwise",
    "o": "rowwise",
}


class Model(nn.Module):
    def __init__(self, heads: int = 8, width: int = 16, vocabulary: int = 32, hidden: int = 16) -> None:
        super().__init__()
        self.num_heads = heads
        self.embedding = nn.Embedding(vocabulary, 8)
        self.q, self.qkv, self.gate_up = nn.Linear(8, width), nn.Linear(8, 16), nn.Linear(8, 2 * hidden)
        self.o = nn.Linear(hidden, 8)


def resolved(model: nn.Module, tensor: Any, plan: dict[str, str] = PLAN, world: int = 8, **sizes: Any) -> Topology:
    options = {"expert": "auto", "expert_tensor": None, "order": "expert_first", "plan": plan, **sizes}
    return resolve_sizes(model, world, world, tensor, **options)


@pytest.mark.parametrize(
    ("model", "largest"),
    [
        (Model(), 4),  # the blocks of qkv
        (Model(heads=2), 2),
        (Model(width=18), 2),
        (Model(vocabulary=30), 2),
        (Model(hidden=6), 2),
        (Model(vocabulary=33), 1),
    ],
)
def test_automatic_tensor_degree_divides_all_that_the_plan_cuts(model: Model, largest: int) -> None:
    assert resolved(model, "auto").tensor == largest
    assert resolved(model, largest).tensor == largest
    with pytest.raises(PlanError, match=f"`tensor_parallel_size={2 * largest}` does not divide"):
        resolved(model, 2 * largest)


def test_automatic_tensor_degree_leaves_room_for_the_experts() -> None:
    model = Model()
    model.moe = MoE(8, 6, 4)
    assert resolved(model, "auto").tensor == 2  # that of the experts' width
    assert resolved(model, "auto", expert_tensor=1, expert=4).tensor == 4
    assert resolved(model, "auto", expert=4, world=4).tensor == 1
    with pytest.raises(LayoutError, match="`expert_parallel_size=3` does not divide"):
        resolved(model, "auto", expert=3, world=6)


def test_automatic_degrees_are_one_where_nothing_is_cut() -> None:
    assert resolved(nn.Linear(8, 8), "auto", {}) == Topology(8, 1, 1, 1, "expert_first")


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"q": "rowwise"}, r"does not divide the width 6 of 'q'; choose one of 1, 2, 3, 6"),
        ({"embedding": "colwise"}, r"'colwise' of 'embedding' fits a torch.nn.Linear itself, not a Embedding"),
        ({"norm": "embedding_rowwise"}, r"'embedding_rowwise' of 'norm' fits a torch.nn.Embedding itself"),
        ({"q.bias": "colwise"}, r"'q.bias' is a parameter, which the style 'colwise' does not fit"),
        ({"q": "packed_colwise:2,2"}, r"the blocks \(2, 2\) of 'q' do not add up to its 8 output features"),
        ({"embedding": "embedding_rowwise"}, r"'embedding' has `max_norm=1.0`"),
        ({"moe.experts": "colwise"}, r"names 'moe.experts', a part of MoE layer 'moe'"),
    ],
)
def test_plans_that_do_not_fit_are_refused_without_processes_and_change_nothing(
    plan: dict[str, str], message: str
) -> None:
    model = nn.ModuleDict(
        {
            "q": nn.Linear(6, 8),
            "norm": nn.LayerNorm(8),
            "embedding": nn.Embedding(8, 8, max_norm=1.0),
            "moe": MoE(8, 8, 4),
        }
    )
    before = repr(model)
    with pytest.raises(PlanError, match=message):
        resolved(model, 4, plan)
    assert repr(model) == before
