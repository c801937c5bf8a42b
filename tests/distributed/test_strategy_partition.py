"""Cutting in place: what is new is found by object, and what cannot be cut is refused by name."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_ted.collectives.recorder import CommRecorder
from lightning_ted.collectives.whole import gather_whole
from lightning_ted.errors import TEDError
from lightning_ted.mesh import TEDMesh
from lightning_ted.moe import MoE
from lightning_ted.strategy.partition import PartitionOptions, mesh_of, partition_module
from lightning_ted.topology import Topology
from tests.support.pool import Pools
from tests.support.runs import Net, Toy, assert_same_everywhere, loader, trainer, whole_weights


def _message(run: Callable[[], Any]) -> str:
    try:
        run()
    except TEDError as error:
        return f"{type(error).__name__}: {error}"
    return ""


class _ReplacesHead(Toy):
    """A fine-tuning script, unseeded: every process makes another head."""

    def setup(self, stage: str) -> None:
        torch.manual_seed(100 + dist.get_rank())
        self.net.head = nn.Sequential(nn.Linear(8, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
        self.net.head[1].running_mean.normal_()
        self.net.moe = MoE(8, 16, 4, bias=True)


def _replaced_head() -> tuple[dict[str, Tensor], tuple[int, ...], str]:
    run = trainer("tp2", max_steps=2)
    run.fit(module := _ReplacesHead("sgd"), loader())
    run.validate(module, loader(), verbose=False)  # replaced once more
    return (
        whole_weights(run),
        tuple(module.net.moe.experts.down_proj.shape),
        run.strategy.layouts["net.head.0.weight"].name,
    )


def test_layers_that_setup_replaces_are_those_of_rank_0_and_cut(pools: Pools) -> None:
    results = pools(4).run(_replaced_head)
    assert_same_everywhere([weights for weights, *_ in results])
    assert {shape for _, shape, _ in results} == {(2, 8, 8)}
    assert "net.head.weight" not in results[0][0]


class _ReplacesStyled(Toy):
    def setup(self, stage: str) -> None:
        self.net.up = nn.Linear(8, 16)


def _replaced_styled() -> str:
    return _message(lambda: trainer("tp2", max_steps=1).fit(_ReplacesStyled(), loader()))


def test_replacing_a_layer_that_the_plan_has_cut_is_refused_by_name(pools: Pools) -> None:
    for message in pools(2).run(_replaced_styled):
        assert "'net.up' has been replaced" in message and "`configure_model`" in message


def _replaced_parameter() -> tuple[bool, bool, str]:
    mesh, options = TEDMesh(Topology(2, 2)), PartitionOptions()
    net = Net()
    whole = net.up.weight.detach().clone()
    partition_module(net, mesh, options)
    part = net.up.weight.detach().clone()
    net.up.weight = nn.Parameter(part.clone())
    net.down.weight = nn.Parameter(torch.ones(8, 16))
    layouts = partition_module(net, mesh, options)
    kept = torch.equal(net.up.weight, part) and torch.equal(gather_whole(part, layouts["up.weight"], mesh), whole)
    net.up.weight = nn.Parameter(torch.ones(3, 3))
    return kept, net.down.weight.shape == (8, 8), _message(lambda: partition_module(net, mesh, options))


def test_a_replaced_parameter_is_taken_as_a_part_or_cut_by_its_shape(pools: Pools) -> None:
    for kept, cut, message in pools(2).run(_replaced_parameter):
        assert kept and cut
        assert (
            "'up.weight' has been replaced by a parameter of shape (3, 3), where (16, 8) (whole) or (8, 8)" in message
        )


class _MarksOnly(Toy):
    def __init__(self) -> None:
        super().__init__("sgd")
        self.part = nn.Linear(8, 8)
        self.tp_plan = {"net.head": "replicate", "part": "replicated_with_grad_allreduce"}

    def setup(self, stage: str) -> None:
        torch.manual_seed(100 + dist.get_rank())
        self.net.head, self.part = nn.Linear(8, 1), nn.Linear(8, 8)


def _replaced_marked() -> tuple[dict[str, Tensor], list[str]]:
    run = trainer("tp2", max_steps=1)
    run.fit(_MarksOnly(), loader())
    layouts = run.strategy.layouts  # type: ignore[attr-defined]
    return whole_weights(run), [layouts[name].family for name in ("net.head.weight", "part.weight")]


def test_a_layer_that_its_style_leaves_as_it_is_may_be_replaced(pools: Pools) -> None:
    results = pools(2).run(_replaced_marked)
    assert_same_everywhere([weights for weights, _ in results])
    assert all(families == ["dense", "partial"] for _, families in results)


def _renamed() -> bool:
    mesh = TEDMesh(Topology(2, 2))
    outer = nn.ModuleDict({"net": Net()})
    partition_module(outer, mesh, PartitionOptions())
    part = outer["net"].up.weight.detach().clone()
    outer["compiled"] = nn.ModuleDict({"_orig_mod": outer["net"]})
    del outer["net"]
    layouts = partition_module(outer, mesh, PartitionOptions())
    assert layouts["compiled._orig_mod.up.weight"].cuts and "net.up.weight" not in layouts
    return torch.equal(outer["compiled"]["_orig_mod"].up.weight, part)


def test_a_parameter_under_a_new_name_is_not_cut_again(pools: Pools) -> None:
    assert all(pools(2).run(_renamed))


# ----------------------------------------------------------------------------------------------------------------------


def _root_layer() -> tuple[tuple[int, ...], str, bool]:
    torch.manual_seed(0)
    layer = MoE(8, 16, 4)
    whole = copy.deepcopy(layer)
    layouts = partition_module(layer, TEDMesh(Topology(2, 1, 2)), PartitionOptions())
    x = torch.randn(6, 8)
    return tuple(layer.experts.down_proj.shape), layouts["experts.down_proj"].family, torch.allclose(layer(x), whole(x))


def test_a_moe_layer_that_is_the_root_is_cut(pools: Pools) -> None:
    assert pools(2).run(_root_layer) == [((2, 8, 16), "expert", True)] * 2


def _parametrized() -> str:
    module = nn.ModuleDict({"a": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "b": nn.Linear(4, 4)})
    plan = {"a": "colwise", "b": "rowwise"}
    return _message(lambda: partition_module(module, TEDMesh(Topology(2, 2)), PartitionOptions(plan)))


def test_a_cut_that_finds_no_parameter_is_refused_by_name(pools: Pools) -> None:
    assert all(text.startswith("PlanError") and "'a" in text for text in pools(2).run(_parametrized))


class _Tied(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(2)]
        )
        self.embedding, self.norm = nn.Embedding(12, 8), nn.LayerNorm(8)
        self.head, self.tail = nn.Linear(8, 12, bias=False), nn.Linear(8, 8)
        self.tp_plan = {"blocks.*.0": "colwise", "blocks.*.2": "rowwise"}
        if kind in ("head", "tied later"):
            if kind == "head":
                self.head.weight = self.embedding.weight
            self.tp_plan |= {"embedding": "embedding_rowwise", "head": "colwise"}
        elif kind == "parameter":
            self.norm.weight = self.blocks[0][1].weight  # type: ignore[assignment]
        elif kind == "module":
            self.norm = self.blocks[0][1]  # type: ignore[assignment]
        elif kind == "styles":
            self.tail = self.blocks[0][0]  # type: ignore[assignment]
            self.tp_plan["tail"] = "replicate"
        else:
            self.norm.weight = self.tail.bias
            self.tp_plan["norm"] = "replicated_with_grad_allreduce"


def _tied(kind: str, sequence_parallel: bool) -> str:
    module = _Tied(kind)
    options = PartitionOptions(sequence_parallel=sequence_parallel)
    return _message(lambda: partition_module(module, TEDMesh(Topology(2, 2)), options))


@pytest.mark.parametrize(
    ("kind", "sequence_parallel", "names"),
    [
        ("head", False, []),
        ("head", True, []),
        ("parameter", False, []),
        ("parameter", True, ["'blocks.0.1.weight'", "'norm.weight'"]),
        ("module", False, []),
        ("module", True, ["'blocks.0.1.weight'", "'norm.weight'"]),
        ("family", False, ["'norm.weight'", "'tail.bias'"]),
        ("styles", False, ["'blocks.0.0'", "'tail'"]),
    ],
)
def test_a_tied_parameter_is_refused_by_both_names_unless_they_agree(
    pools: Pools, kind: str, sequence_parallel: bool, names: list[str]
) -> None:
    for message in pools(2).run(_tied, kind, sequence_parallel):
        assert bool(message) == bool(names)
        assert all(name in message for name in names), message


# ----------------------------------------------------------------------------------------------------------------------


def _tied_later(other: str) -> tuple[str, list[tuple[int, ...]]]:
    mesh, module = TEDMesh(Topology(2, 2)), _Tied("tied later")
    module.tp_plan["head"] = other
    partition_module(module, mesh, PartitionOptions())
    module.head.weight = module.embedding.weight
    message = _message(lambda: partition_module(module, mesh, PartitionOptions()))
    return message, [tuple(layer.weight.shape) for layer in (module.embedding, module.head)]


def test_parts_may_be_tied_after_they_were_cut_if_both_styles_agree(pools: Pools) -> None:
    assert pools(2).run(_tied_later, "colwise") == [("", [(6, 8), (6, 8)])] * 2
    for message, _ in pools(2).run(_tied_later, "replicate"):
        assert "'embedding.weight' and 'head.weight' are one tied parameter" in message


def _pickled() -> tuple[str, str]:
    toy = Toy()
    run = trainer("tp2", max_steps=1)
    run.fit(toy, loader())
    toy._trainer, toy._device_mesh = None, None
    again = pickle.loads(pickle.dumps(toy))
    plain = Net()
    partition_module(plain, TEDMesh(Topology(2, 2)), PartitionOptions())
    plain = pickle.loads(pickle.dumps(plain))
    return (
        _message(lambda: trainer("tp2").validate(again, loader())),
        _message(lambda: partition_module(plain, TEDMesh(Topology(2, 2)), PartitionOptions())),
    )


def test_a_module_that_was_pickled_in_parts_is_refused(pools: Pools) -> None:
    for messages in pools(2).run(_pickled):
        assert all("parts of one rank and has been pickled" in m and "load a checkpoint" in m for m in messages)


def _after_the_end() -> str:
    toy, later = Toy(), trainer("tp2")
    trainer("tp2").validate(toy, loader(), verbose=False)
    dist.barrier()
    dist.destroy_process_group()
    return _message(lambda: later.validate(toy, loader(), verbose=False))


def test_a_module_that_was_cut_in_an_earlier_process_group_is_refused(pools: Pools) -> None:
    assert all("a process group that has been destroyed" in message for message in pools(2).run(_after_the_end))


def _second_strategy() -> tuple[bool, int]:
    toy = Toy()
    first, second = trainer("tp2"), trainer("tp2")
    first.validate(toy, loader(), verbose=False)

    second.validate(toy, loader(), verbose=False)
    with second.strategy.mesh.recording(CommRecorder()) as recorder:  # type: ignore[attr-defined]
        toy.net(torch.ones(2, 8))
    same = first.strategy.mesh is second.strategy.mesh is mesh_of(toy)  # type: ignore[attr-defined]
    return same, sum(recorder.calls.values())


def test_a_second_strategy_takes_over_the_mesh_of_the_layers(pools: Pools) -> None:
    for same, calls in pools(2).run(_second_strategy):
        assert same and calls > 0
