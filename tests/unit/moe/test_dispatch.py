"""Which dispatcher a layer gets, and the order in which tokens travel."""

from __future__ import annotations

import pytest
import torch

from lightning_ted.errors import TEDError
from lightning_ted.mesh import SINGLE, Axis
from lightning_ted.moe.axes import MoEAxes
from lightning_ted.moe.dispatch import interface, make_dispatcher, register_dispatcher
from lightning_ted.moe.dispatch.exchanging import ExchangingDispatcher
from lightning_ted.moe.dispatch.local import LocalDispatcher
from lightning_ted.moe.dispatch.order import Order
from lightning_ted.moe.dispatch.wiring import FlatWiring, HierarchicalWiring
from lightning_ted.moe.routing import count_experts


def axes(expert: int = 4, inside: int = 2, across: int = 2, **options: object) -> MoEAxes:
    axis = Axis("expert", expert)
    parts = Axis("expert_inside", inside), Axis("expert_across", across)
    return MoEAxes(SINGLE, SINGLE, SINGLE, axis, SINGLE, inside=parts[0], across=parts[1], **options)  # type: ignore[arg-type]


def wiring_of(axes: MoEAxes) -> object:
    dispatcher = make_dispatcher(axes)
    assert isinstance(dispatcher, ExchangingDispatcher)
    return dispatcher._wiring


def test_experts_that_are_here_and_whole_need_no_exchange() -> None:
    assert isinstance(make_dispatcher(None), LocalDispatcher)
    assert isinstance(make_dispatcher(axes(1, 1, 1, dispatcher="hierarchical")), LocalDispatcher)


def test_a_hierarchy_needs_several_nodes_with_several_ranks() -> None:
    assert isinstance(wiring_of(axes()), FlatWiring)
    assert isinstance(wiring_of(axes(dispatcher="hierarchical")), HierarchicalWiring)
    assert isinstance(wiring_of(axes(4, 4, 1, dispatcher="hierarchical")), FlatWiring)
    assert isinstance(wiring_of(axes(4, 1, 4, dispatcher="hierarchical")), FlatWiring)


def test_a_dispatcher_of_ones_own_is_chosen_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "_DISPATCHERS", dict(interface._DISPATCHERS))
    mine = LocalDispatcher()
    register_dispatcher("mine", lambda axes: mine)
    assert make_dispatcher(axes(dispatcher="mine")) is mine
    with pytest.raises(TEDError, match="`name='mine'` is the name of another"):
        register_dispatcher("mine", lambda axes: mine)
    with pytest.raises(TEDError, match="`moe_dispatcher='yours'` is unknown; choose one of 'all_to_all', 'hier"):
        make_dispatcher(axes(dispatcher="yours"))


@pytest.mark.parametrize("chunks", [1, 2, 3, 9])
@pytest.mark.parametrize("may_drop", [False, True])
def test_tokens_are_sorted_by_chunk_then_expert(chunks: int, may_drop: bool) -> None:
    torch.manual_seed(0)
    tokens, choices, experts = 7, 2, 4
    expert_TK = torch.randint(experts + may_drop, (tokens, choices))
    order = Order.of(expert_TK, experts, may_drop, chunks)
    chunk_of = [token * chunks // tokens for token in range(tokens)]
    kept = [
        (chunk_of[n // choices], expert, n) for n, expert in enumerate(expert_TK.flatten().tolist()) if expert < experts
    ]
    assert order.order_N[: len(kept)].tolist() == [n for _, _, n in sorted(kept)]
    assert torch.equal(order.order_N[order.position_TK.flatten()], torch.arange(tokens * choices))
    assert order.counts_CE.shape == (chunks, experts)
    for chunk in range(chunks):
        here = [expert for index, expert, _ in kept if index == chunk]
        assert order.counts_CE[chunk].tolist() == count_experts(torch.tensor(here, dtype=torch.int64), experts).tolist()


def test_experts_go_out_by_the_places_of_their_ranks_in_the_node() -> None:
    wiring = HierarchicalWiring(Axis("expert", 6), Axis("inside", 3), Axis("across", 2))
    experts = 12  # two a rank: expert e is on rank e // 2, which is place rank % 3 of node rank // 3
    places = wiring.place(torch.arange(experts + 1), experts).tolist()
    by_place = sorted(range(experts), key=lambda e: ((e // 2) % 3, e // 2 // 3, e % 2))
    assert [places[expert] for expert in by_place] == list(range(experts))
    assert places[experts] == experts
