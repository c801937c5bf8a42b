"""What cannot work is refused by name before a run; what may not be meant is warned of."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from lightning_ted import MoE, TEDStrategy
from lightning_ted.errors import LayoutError, PlanError, TEDError, UnsupportedError
from lightning_ted.layout import Cut, ParamLayout
from lightning_ted.mesh import TEDMesh
from lightning_ted.strategy import checks
from lightning_ted.strategy.hints import add_hint
from lightning_ted.strategy.metrics import reduce_over
from lightning_ted.strategy.partition import PartitionOptions
from lightning_ted.tensor_parallel.plan import Style
from lightning_ted.topology import Topology
from tests.support.reduced import training_of


class _OnlyExperts(BoringModel):
    def __init__(self) -> None:
        super().__init__()
        self.moe = MoE(8, 8, 4)


class _Planned(BoringModel):
    tp_plan = {"layer": "colwise_gather_output"}


def _fit(model: L.LightningModule, **sizes: Any) -> None:
    """Up to the launcher, which would start the second process."""
    run = L.Trainer(
        accelerator="cpu",
        devices=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        strategy=TEDStrategy(**sizes),
    )
    run.strategy.launcher._check(model, ())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("model", "sizes", "error", "message"),
    [
        (
            BoringModel,
            {"expert_parallel_size": 2},
            LayoutError,
            r"`expert_parallel_size=2` finds no .*MoE.* BoringModel",
        ),
        (BoringModel, {"tensor_parallel_size": 2}, PlanError, r"`tensor_parallel_size=2` finds nothing .*`tp_plan`"),
        (
            _Planned,
            {"tensor_parallel_size": 2, "expert_tensor_parallel_size": 2},
            LayoutError,
            r"`expert_tensor_parallel_size=2` finds no",
        ),
        (
            _OnlyExperts,
            {"tensor_parallel_size": 2, "sequence_parallel": True},
            PlanError,
            r"`sequence_parallel=True` finds no tensor-parallel layers in _OnlyExperts",
        ),
    ],
)
def test_sizes_that_find_nothing_to_cut_are_refused(
    model: type[BoringModel], sizes: dict[str, Any], error: type[TEDError], message: str
) -> None:
    with pytest.raises(error, match=message):
        _fit(model(), **sizes)


def test_blocks_that_do_not_exist_are_refused_before_processes_start() -> None:
    with pytest.raises(UnsupportedError, match="names 'Block', but BoringModel holds no module of that class"):
        _fit(BoringModel(), activation_checkpointing="full", activation_checkpointing_policy=["Block"])


def test_sizes_that_find_something_or_may_find_it_later_are_accepted() -> None:
    class MadeInSetup(BoringModel):
        def setup(self, stage: str) -> None:
            pass

    _fit(BoringModel(), tensor_parallel_size="auto")
    _fit(_Planned(), tensor_parallel_size=2)
    _fit(_OnlyExperts(), tensor_parallel_size=2, expert_parallel_size=2, expert_tensor_parallel_size=1)
    _fit(MadeInSetup(), tensor_parallel_size=2)


def test_sizes_that_do_less_than_one_may_think_are_told_of() -> None:
    with pytest.warns(UserWarning, match="all but its MoE layers is replicated"):
        checks.warn_of_idle_sizes(_OnlyExperts(), {}, Topology(2, 2), 2)
    with pytest.warns(UserWarning, match="`tensor_parallel_size='auto'` is 1: BoringModel has no"):
        checks.warn_of_idle_sizes(BoringModel(), {}, Topology(2), "auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checks.warn_of_idle_sizes(_Planned(), {"layer": Style("colwise")}, Topology(2, 2), "auto")
        checks.warn_of_idle_sizes(BoringModel(), {}, Topology(2), 1)


def test_ways_of_sending_that_make_no_difference_are_told_of() -> None:
    with pytest.warns(UserWarning, match="`moe_overlap_chunks=2` overlaps nothing"):
        checks.warn_of_idle_dispatch(Topology(4), PartitionOptions(overlap_chunks=2), 4)
    hierarchical = PartitionOptions(dispatcher="hierarchical", overlap_chunks=2)
    with pytest.warns(UserWarning, match="'hierarchical'` sends as 'all_to_all' does, .* has one node"):
        checks.warn_of_idle_dispatch(Topology(4, expert=4), hierarchical, 4)
    with pytest.warns(UserWarning, match="has one rank in each node"):
        checks.warn_of_idle_dispatch(Topology(4, 2, 2, 2), hierarchical, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checks.warn_of_idle_dispatch(Topology(4, expert=4), hierarchical, 2)


def test_groups_that_lie_unevenly_on_nodes_are_refused_before_processes_start() -> None:
    strategy = TEDStrategy(
        expert_parallel_size=8, moe_dispatcher="hierarchical", parallel_devices=[torch.device("cpu")] * 6
    )
    strategy.num_nodes = 4
    with pytest.raises(
        LayoutError, match="lie unevenly on nodes of 6; choose an `expert_parallel_size` that divides the 6"
    ):
        _ = strategy.topology


# ----------------------------------------------------------------------------------------------------------------------


class _MySGD(torch.optim.SGD):
    pass


class _ByNorm(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            parameter.grad.div_(parameter.grad.norm())
        return super().step(closure)


class _ByGlobalNorm(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        grads = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        torch._foreach_div_(grads, torch.nn.utils.get_total_norm(grads))
        return super().step(closure)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.RMSprop, _MySGD])
def test_elementwise_optimizers_may_step_parts(kind: Any) -> None:
    assert not checks.needs_whole_parameters(kind(BoringModel().parameters(), lr=0.1))


@pytest.mark.parametrize("kind", [_ByNorm, torch.optim.Adafactor])
def test_optimizers_that_mix_elements_step_whole_parameters_only(kind: Any) -> None:
    model = BoringModel()
    parameters = dict(model.named_parameters())
    layouts = {name: ParamLayout(name, tuple(p.shape)) for name, p in parameters.items()}
    layouts["layer.weight"] = ParamLayout("layer.weight", (4, 32), (Cut(0, "tensor", 2, (4,)),))
    optimizer = kind([model.layer.bias], lr=0.1)
    assert checks.needs_whole_parameters(optimizer)
    training = training_of(model, TEDMesh(Topology(1)), layouts, optimizer, whole=True)
    # In mid-run, as finetuning does.
    optimizer.add_param_group({"params": [model.layer.weight]})
    with pytest.raises(UnsupportedError, match=rf"`{kind.__name__}` cannot step 'layer.weight', .* mixes the elements"):
        training.adopt_new_parameters()


@pytest.mark.parametrize(("kind", "why"), [(_ByGlobalNorm, "mixes parameters"), (torch.optim.LBFGS, "closure")])
def test_optimizers_that_mix_parameters_or_cannot_be_tried_are_refused(kind: Any, why: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"`{kind.__name__}` cannot be used .*{why}.* such as `AdamW`"):
        checks.needs_whole_parameters(kind(BoringModel().parameters(), lr=0.1))


def test_trained_parameters_that_no_optimizer_steps_are_named() -> None:
    model = BoringModel()
    optimizer = torch.optim.SGD([model.layer.weight], lr=0.1)
    with pytest.warns(UserWarning, match=r"1 parameters require gradients, but .*'layer.bias'"):
        checks.warn_of_unstepped(model, [optimizer])
    model.layer.bias.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checks.warn_of_unstepped(model, [optimizer])


def test_sparse_gradients_are_refused_by_name_unless_frozen() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(4, 2, sparse=True)})
    with pytest.raises(UnsupportedError, match=r"'table' is a Embedding\(sparse=True\).*`sparse=False`"):
        checks.refuse_sparse_gradients(model)
    checks.refuse_sparse_gradients(model.requires_grad_(False))


# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message", ["CUDA out of memory. Tried to allocate 2 GiB", "DefaultCPUAllocator: can't allocate memory"]
)
def test_running_out_of_memory_says_what_needs_less(message: str) -> None:
    error = torch.OutOfMemoryError(message)
    TEDStrategy().on_exception(error)
    text = str(error)
    assert text.startswith(message)
    assert all(word in text for word in ("batch", "activation checkpointing", "`tensor_parallel_size`"))


def test_an_exception_without_a_hint_stays_as_it_is() -> None:
    error = KeyError("name", 3)
    add_hint(error)
    assert error.args == ("name", 3)


@pytest.mark.parametrize("op", ["bor", "PREMUL_SUM"])
def test_an_unknown_reduction_is_refused_with_the_legal_ones(op: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"(?i)`reduce_op='{op}'`.*mean, avg, sum, max, min, product"):
        reduce_over(torch.ones(()), None, 1, op)


def test_reduce_takes_torchs_ops_and_refuses_the_others() -> None:
    strategy = TEDStrategy()
    strategy._mesh = SimpleNamespace(axis=lambda _: SimpleNamespace(size=1, group=None))  # type: ignore[assignment]
    assert strategy.reduce(torch.ones(()), reduce_op=torch.distributed.ReduceOp.SUM) == 1
    assert strategy.reduce(torch.ones(()), reduce_op=None) == 1
    with pytest.raises(UnsupportedError, match="choose one of"):
        strategy.reduce(torch.ones(()), reduce_op=torch.distributed.ReduceOp.BXOR)


def test_a_notebook_is_refused_by_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    connector = "lightning.pytorch.trainer.connectors.accelerator_connector._IS_INTERACTIVE"
    monkeypatch.setattr(connector, True)
    with pytest.raises(MisconfigurationException, match="not compatible with an interactive environment"):
        L.Trainer(accelerator="cpu", devices=2, strategy="ted", logger=False)


@pytest.mark.parametrize("name", ["ted_spawn", "ted_fork", "ted_notebook"])
def test_there_are_no_strategies_that_start_processes_in_another_way(name: str) -> None:
    with pytest.raises(ValueError, match="invalid strategy name"):
        L.Trainer(accelerator="cpu", devices=2, strategy=name, logger=False)
