"""Masters and state in host memory: nothing but their place may change, whenever copies take place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_ted.mesh import TEDMesh
from lightning_ted.optim import offload
from lightning_ted.topology import Topology
from tests.support.stepping import (
    ELEMENTWISE,
    backward,
    gradients,
    make_parameters,
    make_training,
    two_groups,
)

SHAPES: list[tuple[int, ...]] = [(7,), (150,), (3, 21), (1,), (), (0,), (2, 5)]
TILES = [1, 65, None]


class Unsettled(Optimizer):
    """A third party's that replaces its state, renames it, and drops some again."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                own = self.state[parameter]
                count = own["count"] = own.get("count", 0) + 1
                own["mean"] = own.get("mean", 0) * 0.9 + parameter.grad
                own["last"], own["first"] = (
                    own.get("first", parameter.grad * 2),
                    own.get("last", parameter.grad.clone()),
                )
                if count == 2:
                    own["late"] = parameter.grad.half()
                if count == 4:
                    own["late"] = own["late"].float() + own.pop("mean")
                parameter.sub_(own.get("mean", 1) * group["lr"] + own["first"] - own["last"] + own.get("late", 0))


class LateLane(offload.Lane):
    """Copies at the last moment, and leaves nonsense in the meantime."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.waiting: list[list[offload.Copy]] = []

    def start(self, copies: Sequence[offload.Copy]) -> offload.Done:
        for target, _ in copies:
            target.fill_(99)
        own = list(copies)
        self.waiting.append(own)
        return _Late(lambda: self._catch_up(own))

    def _catch_up(self, until: list[offload.Copy]) -> None:
        while any(copies is until for copies in self.waiting):
            super().start(self.waiting.pop(0))


class _Late(offload.Done):
    def __init__(self, settle: Callable[[], None]) -> None:
        object.__setattr__(self, "_settle", settle)

    def wait(self) -> None:
        self._settle()  # type: ignore[attr-defined]

    synchronize = wait


def _make(name: str, parameters: Mapping[str, Parameter]) -> Optimizer:
    if name == "Unsettled":
        return Unsettled(two_groups(parameters, {"lr": 0.1}))
    kind, settings = ELEMENTWISE[name]
    return kind(two_groups(parameters, settings), **settings)


def _train(
    optimizer: Callable[[Mapping[str, Parameter]], Optimizer], tile_size: int | None, offloads: bool, **options: Any
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and state after steps in which parameters have no gradient, come later, and are clipped."""
    parameters = make_parameters([*SHAPES, (11,), (2, 3)], torch.float32)
    early = {name: parameter for name, parameter in parameters.items() if name not in ("p7", "p8")}
    made = optimizer(early)
    training = make_training(parameters, TEDMesh(Topology(1)), [made], tile_size=tile_size, offload=offloads, **options)
    for step in range(6):
        if step == 3:
            made.add_param_group({"params": [parameters["p7"], parameters["p8"]], "lr": 0.01})
            training.adopt_new_parameters()
        made.zero_grad()
        grads = gradients(parameters if step >= 3 else early, step)
        for missing in {0: ["p3"], 1: ["p1", "p2"], 2: ["p0", "p1", "p2", "p3", "p4"]}.get(step, []):
            del grads[missing]
        backward(training, parameters, grads)
        if step % 2:
            made.sharded.clip_by_norm(0.5)
        made.step()
    training.release()
    return {name: parameter.detach() for name, parameter in parameters.items()}, made.state_dict()


def _assert_same(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    if isinstance(ours, Tensor):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
    elif isinstance(ours, Mapping):
        assert ours.keys() == theirs.keys()
        for key in ours:
            _assert_same(ours[key], theirs[key])
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs)
        for pair in zip(ours, theirs, strict=True):
            _assert_same(*pair)
    else:
        assert ours == theirs


@pytest.fixture(params=["at once", "late"])
def _copies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "late":
        monkeypatch.setattr(offload, "Lane", LateLane)


@pytest.mark.usefixtures("_copies")
@pytest.mark.parametrize("name", [*ELEMENTWISE, "Unsettled"])
def test_offloaded_steps_are_bit_for_bit_the_others(name: str) -> None:
    for tile_size in TILES:
        kept, offloaded = (_train(lambda p: _make(name, p), tile_size, where) for where in (False, True))
        assert any(entries for entries in kept[1]["state"].values()) or name == "SGD"
        _assert_same(offloaded, kept)


@pytest.mark.usefixtures("_copies")
@pytest.mark.parametrize("name", ["AdamW", "SGD nesterov", "Adagrad", "Counting", "Unsettled"])
def test_masters_of_16_bit_weights_are_offloaded_too(name: str) -> None:
    for tile_size in TILES:
        kept, offloaded = (
            _train(lambda p: _make(name, p), tile_size, where, working=torch.bfloat16) for where in (False, True)
        )
        _assert_same(offloaded, kept)


@pytest.mark.usefixtures("_copies")
@pytest.mark.parametrize("working", [None, torch.bfloat16])
def test_whole_parameters_keep_their_shape(working: torch.dtype | None) -> None:
    def adafactor(parameters: Mapping[str, Parameter]) -> Optimizer:
        return torch.optim.Adafactor([p for p in parameters.values() if p.numel()], lr=0.1)

    for tile_size in TILES:
        kept, offloaded = (_train(adafactor, tile_size, where, whole=True, working=working) for where in (False, True))
        _assert_same(offloaded, kept)


def _one_step(optimizer: str, tile_size: int | None, **options: Any) -> tuple[Optimizer, Any, dict[str, Parameter]]:
    parameters = make_parameters(SHAPES, torch.float32)
    made = _make(optimizer, parameters)
    training = make_training(parameters, TEDMesh(Topology(1)), [made], tile_size=tile_size, offload=True, **options)
    backward(training, parameters, gradients(parameters, 0))
    made.step()
    return made, training, parameters


def _storages(optimizer: Optimizer, key: str) -> list[int]:
    """Where the state of each tile is; the number that is a parameter of its own is not moved."""
    found = []
    for tile in optimizer.sharded._tiles:
        own = {optimizer.state[s.master][key].untyped_storage().data_ptr() for s in tile if s.master.dim()}
        assert len(own) <= 1
        found += own
    return found


@pytest.mark.parametrize("tile_size", TILES)
def test_each_key_of_a_tile_is_one_tensor_on_the_host(tile_size: int | None) -> None:
    made, training, parameters = _one_step("AdamW", tile_size)
    before = {key: _storages(made, key) for key in ("exp_avg", "exp_avg_sq")}
    for found in before.values():
        assert len(set(found)) == len(found) == {1: 10, 65: 4, None: 1}[tile_size]
    made.zero_grad()
    backward(training, parameters, gradients(parameters, 1))
    made.step()
    # Nothing is made anew, and nothing of the device's is left.
    assert before == {key: _storages(made, key) for key in ("exp_avg", "exp_avg_sq")}


def test_a_tile_without_gradients_does_not_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    lanes: list[LateLane] = []

    class Counted(LateLane):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            self.elements = 0
            lanes.append(self)

        def start(self, copies: Sequence[offload.Copy]) -> offload.Done:
            self.elements += sum(target.numel() for target, _ in copies)
            return super().start(copies)

    monkeypatch.setattr(offload, "Lane", Counted)
    made, training, parameters = _one_step("AdamW", 7)
    before = [lane.elements for lane in lanes]  # type: ignore[attr-defined]
    made.zero_grad()
    backward(training, parameters, {"p0": gradients(parameters, 1)["p0"]})  # of 7 elements
    made.step()
    moved = [lane.elements - start for lane, start in zip(lanes, before, strict=True)]  # type: ignore[attr-defined]
    # The one tile that has it, with two moments.
    assert moved == [2 * 7, 2 * 7]
    made.zero_grad()
    made.step()
    assert [lane.elements - start for lane, start in zip(lanes, before, strict=True)] == moved  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["AdamW", "Adagrad", "SGD nesterov"])
@pytest.mark.parametrize("loads", [False, True])
def test_state_moves_from_and_to_runs_that_do_not_offload(name: str, loads: bool) -> None:
    """Four steps, of which the last two by a new optimizer that has loaded the state of the first."""
    outcomes = []
    for places in [(False, False), (not loads, loads), (True, True)]:
        parameters = make_parameters(SHAPES, torch.float32)
        state: dict[str, Any] | None = None
        for half, offloads in enumerate(places):
            made = _make(name, parameters)
            training = make_training(parameters, TEDMesh(Topology(1)), [made], tile_size=9 + half, offload=offloads)
            if state is not None:
                made.load_state_dict(state)
            for step in range(2):
                made.zero_grad()
                backward(training, parameters, gradients(parameters, half, step))
                made.step()
            state = made.state_dict()
            training.close()
        outcomes.append(({n: p.detach() for n, p in parameters.items()}, state))
    _assert_same(outcomes[1], outcomes[0])
    _assert_same(outcomes[2], outcomes[0])


def test_state_that_was_replaced_between_steps_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = []
    for offloads in (False, True):
        parameters = make_parameters(SHAPES, torch.float32)
        made = _make("AdamW", parameters)
        training = make_training(parameters, TEDMesh(Topology(1)), [made], tile_size=9, offload=offloads)
        for step in range(3):
            made.zero_grad()
            backward(training, parameters, gradients(parameters, step))
            made.step()
            for segment in made.sharded.segments:
                own = made.state[segment.master]
                own["exp_avg"] = own["exp_avg"] + 1 if step else own["exp_avg"].mul_(2)
        outcomes.append(({n: p.detach() for n, p in parameters.items()}, made.state_dict()))
    _assert_same(outcomes[1], outcomes[0])


def test_masters_can_be_read_and_replaced_between_steps() -> None:
    made, training, parameters = _one_step("AdamW", 9, working=torch.bfloat16)
    share = made.sharded
    master = share.gather_master(parameters["p2"])
    assert master is not None and master.shape == (3, 21)
    assert torch.equal(master.bfloat16(), parameters["p2"].detach())
    training.update_masters({"p2": torch.full((3, 21), 0.1)})
    made.zero_grad()
    made.step()
    training.release()
    assert torch.equal(parameters["p2"].detach(), torch.full((3, 21), 0.1))
    training.acquire()
    backward(training, parameters, gradients(parameters, 1))
    made.step()
    again = share.gather_master(parameters["p2"])
    assert again is not None and torch.equal(again.bfloat16(), parameters["p2"].detach())
    assert not torch.equal(again, torch.full((3, 21), 0.1))


def test_counts_of_steps_are_loaded_as_fused_kernels_read_them() -> None:
    made, _, _ = _one_step("AdamW", None)
    state = made.state_dict()
    for entries in state["state"].values():
        entries["step"] = entries["step"].to(torch.int64)
    made.load_state_dict(state)
    assert {made.state[segment.master]["step"].dtype for segment in made.sharded.segments} == {torch.float32}
