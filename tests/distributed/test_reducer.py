"""When gradients are sent, how often, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

from lightning_ted.collectives.recorder import CommRecorder
from lightning_ted.errors import UnsupportedError
from lightning_ted.layout import Family
from lightning_ted.mesh import TEDMesh
from lightning_ted.topology import Topology
from tests.support.pool import Pools
from tests.support.stepping import Twin, backward, gradients, make_parameters, make_training

SHAPES: list[tuple[int, ...]] = [(40,), (50,), (60,), (70,)]
stages = pytest.mark.parametrize("stage", [1, 2])


class _Sent(CommRecorder):
    """The reductions, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.reductions: list[int] = []

    def note(self, kind: str, axis: str, sent: int) -> None:
        super().note(kind, axis, sent)
        if kind == "reduce_scatter":
            self.reductions.append(sent)


def _with_buckets_of(size: int, function: Callable[..., Any], *args: Any) -> Any:
    """With 32 elements, each parameter has a bucket of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_ted.optim.reducer.BUCKET_SIZE", size)
        return function(*args)


def _twin(stage: int = 1, shapes: Sequence[tuple[int, ...]] = SHAPES) -> Twin:
    mesh = TEDMesh(Topology(dist.get_world_size()))
    return Twin(mesh, lambda ps: torch.optim.SGD(ps.values(), lr=0.1), shapes, zero_stage=stage)


def _recorded(twin: Twin, *args: Any, **options: Any) -> _Sent:
    with twin.mesh.recording(_Sent()) as sent:
        twin.backward(*args, **options)
    return sent


def _accumulated(stage: int) -> list[dict[tuple[str, str], int]]:
    twin = _twin(stage)
    return [dict(_recorded(twin, index, index == 2).calls) for index in range(3)]


@stages
def test_accumulation_sends_gradients_once(pools: Pools, stage: int) -> None:
    for calls in pools(2).run(_with_buckets_of, 32, _accumulated, stage):
        assert calls == [{}, {}, {("reduce_scatter", "data"): 4, ("all_reduce", "world"): 1}]


# ---------------------------------------------------------------------------------------------------------------------
# Families
# ---------------------------------------------------------------------------------------------------------------------

FAMILIES: dict[str, Family] = {"p0": "dense", "p1": "partial", "p2": "expert", "p3": "dense"}
#: Tensor x data; expert-data x expert, and folded.
LAYOUTS = [(4, 1, 1, 1), (4, 2, 2, 1), (4, 2, 1, 2), (4, 1, 4, 1), (2, 2, 1, 1), (2, 1, 2, 1)]


def _family_errors(stage: int, layouts: Sequence[tuple[int, ...]]) -> dict[str, float]:
    errors: dict[str, float] = {}
    for layout in layouts:
        topology = Topology(*layout)
        mesh = TEDMesh(topology)
        parameters = make_parameters(SHAPES)
        replication = {"p2": topology.expert_data}
        optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
        training = make_training(
            parameters, mesh, [optimizer], zero_stage=stage, families=FAMILIES, replication=replication
        )

        def of(rank: int, seed: int) -> dict[str, Tensor]:
            """Tensor peers agree on what is dense, as they read the same batch."""
            own, shared = gradients(parameters, seed, rank), gradients(parameters, seed, 100 + rank // topology.tensor)  # noqa: B023
            return {name: shared[name] if family == "dense" else own[name] for name, family in FAMILIES.items()}

        # Passes that add up: some accumulate, some do not.
        lasts = [True, False, True, True]
        for seed, last in enumerate(lasts):
            backward(training, parameters, of(mesh.rank, seed), last)
        squares = 0.0
        for name, family in FAMILIES.items():
            axis = {"dense": "data", "partial": "world", "expert": "expert_data"}[family]
            members = topology.group(axis, mesh.rank)  # type: ignore[arg-type]
            want = sum(of(rank, seed)[name] for rank in members for seed in range(len(lasts))) / topology.data
            got = optimizer.sharded.local_gradient(parameters[name])  # type: ignore[attr-defined]
            errors[f"{layout} {name}"] = (got - want).abs().max().item()
            square = torch.as_tensor(want).square().sum()
            if family == "expert":
                # One rank after the other of those that hold other experts.
                all_squares = [torch.zeros_like(square) for _ in range(topology.world_size)]
                dist.all_gather(all_squares, square)
                square = torch.stack(all_squares).sum() / topology.expert_data
            squares += square.item()
        errors[f"{layout} norm"] = abs(optimizer.sharded.grad_norm().item() / squares**0.5 - 1)  # type: ignore[attr-defined]
        training.close()
    return errors


@stages
def test_passes_of_every_family_add_up_and_the_norm_counts_each_element_once(pools: Pools, stage: int) -> None:
    for world in (2, 4):
        layouts = [layout for layout in LAYOUTS if layout[0] == world]
        for errors in pools(world).run(_family_errors, stage, layouts):
            assert len(errors) == 5 * len(layouts)
            assert not {what: error for what, error in errors.items() if not error < 1e-12}


# ---------------------------------------------------------------------------------------------------------------------
# Order
# ---------------------------------------------------------------------------------------------------------------------


def _early(stage: int) -> list[tuple[int, int]]:
    twin = _twin(stage)
    counts = []
    for step in range(3):
        twin.train(1, seed=step)
        counts.append((twin.training.reducer.sent_early, twin.training.reducer.sent))
    assert twin.error() < 1e-12
    return counts


@stages
def test_after_the_first_pass_buckets_are_sent_while_backward_runs(pools: Pools, stage: int) -> None:
    for first, *others in pools(2).run(_with_buckets_of, 32, _early, stage):
        assert first[0] == 0 < first[1]
        assert all(early == sent == first[1] for early, sent in others)


def _orders() -> list[list[int]]:
    twin = _twin(shapes=[(200,), (150,), (100,), (50,)])
    return [_recorded(twin, step).reductions for step in range(3)]


def test_buckets_go_in_the_order_of_their_completion(pools: Pools) -> None:
    first, second = pools(2).run(_with_buckets_of, 32, _orders)
    # Half of each bucket, aligned, in 64-bit numbers; the last term of the loss has the first gradient.
    assert first == second == [[8 * size for size in (32, 64, 96, 128)]] * 3


def _held_up(stage: int) -> list[tuple[int, int]]:
    twin = _twin(stage)
    found = []
    for step in range(4):
        twin.zero_grad()
        # Rank 1 uses it in the end.
        twin.backward(step, without=lambda rank, s=step: [] if rank and s == 3 else ["p2"])  # type: ignore[misc]
        twin.step()
        found.append((twin.training.reducer.sent_early, twin.training.reducer.sent))
    assert twin.error() < 1e-12
    return found


@stages
def test_a_bucket_without_gradients_is_not_sent_and_holds_up_none(pools: Pools, stage: int) -> None:
    for found in pools(2).run(_with_buckets_of, 32, _held_up, stage):
        (early, first), *others, (before_last, with_all) = found
        assert early == 0 and others == [(first, first)] * 2
        # Used by one rank: all of them send it, at the end.
        assert before_last == first < with_all


def _missed_late(stage: int) -> list[list[int]]:
    """A parameter that was used at first is used by one rank only, then by nobody, then by all."""
    twin = _twin(stage)
    absent: list[Callable[[int], list[str]]] = [
        lambda rank: [],
        lambda rank: [],
        lambda rank: ["p1", "p2"] if rank else [],
        lambda rank: [] if rank else ["p3"],
        lambda rank: ["p2"],
        lambda rank: ["p2"],
        lambda rank: [],
    ]
    orders = []
    for step, without in enumerate(absent):
        twin.zero_grad()
        orders.append(_recorded(twin, step, without=without).reductions)
        twin.step()
    assert twin.error() < 1e-12
    return orders


@pytest.mark.parametrize("world", [2, 4])
@stages
def test_ranks_that_miss_gradients_send_in_the_same_order(pools: Pools, world: int, stage: int) -> None:
    ranks = pools(world).run(_with_buckets_of, 32, _missed_late, stage)
    assert all(orders == ranks[0] for orders in ranks)
    # What nobody uses is sent once more, as nobody knows it yet.
    assert [len(order) for order in ranks[0]] == [4, 4, 4, 4, 4, 3, 4]


# ---------------------------------------------------------------------------------------------------------------------
# Gradients that come more than once
# ---------------------------------------------------------------------------------------------------------------------


def _reused(stage: int, reentrant: bool) -> float:
    """A parameter is used within several checkpointed regions and outside of them."""
    twin = _twin(stage)
    world = dist.get_world_size()

    def loss(parameters: dict[str, Parameter], rank: int, checkpointed: bool) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for index, name in enumerate(["p0", "p1", "p0", "p2", "p0"]):
            # Not an argument of the region: a reentrant one then leaves it a gradient each time.
            parameter = parameters[name]
            x = torch.full((1,), 0.1 * (index + rank + 1), dtype=torch.float64, requires_grad=True)

            def region(x: Tensor, parameter: Parameter = parameter) -> Tensor:
                return (parameter * x).square().sum()

            total = total + (checkpoint(region, x, use_reentrant=reentrant) if checkpointed else region(x))  # type: ignore[operator]
        return total + parameters["p0"].sum() + parameters["p3"].sum()

    for _ in range(3):
        twin.zero_grad()
        with twin.training.backward():
            loss(twin.ours, dist.get_rank(), True).backward()
        (sum(loss(twin.theirs, rank, False) for rank in range(world)) / world).backward()  # type: ignore[union-attr]
        twin.step()
    return twin.error()


@stages
@pytest.mark.parametrize("reentrant", [True, False])
def test_shared_parameters_may_be_checkpointed(pools: Pools, stage: int, reentrant: bool) -> None:
    for size in (32, 2**23):
        assert all(error < 1e-12 for error in pools(2).run(_with_buckets_of, size, _reused, stage, reentrant))


def _twice_in_a_pass(stage: int) -> str:
    twin = _twin(stage)
    twin.train(2)
    loss = sum(parameter.square().sum() for parameter in twin.ours.values())
    try:
        with twin.training.backward():
            loss.backward(retain_graph=True)  # type: ignore[union-attr]
            loss.backward()  # type: ignore[union-attr]
    except UnsupportedError as error:
        # The next pass is as good as ever.
        twin.zero_grad()
        twin.train(1, seed=1)
        assert twin.error() < 1e-12
        return str(error)
    return "none"


@stages
def test_a_gradient_that_comes_too_late_is_refused_with_a_hint(pools: Pools, stage: int) -> None:
    for text in pools(2).run(_with_buckets_of, 32, _twice_in_a_pass, stage):
        assert text.startswith("'p") and "HINT: checkpoint activations with `use_reentrant=False`" in text


def _graph_is_retained(stage: int) -> float:
    twin = _twin(stage)
    ours, theirs = (sum(p.square().sum() for p in parameters.values()) for parameters in (twin.ours, twin.theirs))
    for retain in (True, True, False):
        with twin.training.backward():
            ours.backward(retain_graph=retain)  # type: ignore[union-attr]
        theirs.backward(retain_graph=retain)  # type: ignore[union-attr]
    twin.step()
    return twin.error()


@stages
def test_passes_over_a_retained_graph_add_up(pools: Pools, stage: int) -> None:
    assert all(error < 1e-12 for error in pools(2).run(_with_buckets_of, 32, _graph_is_retained, stage))


# ---------------------------------------------------------------------------------------------------------------------
# The norm, and what clips by it
# ---------------------------------------------------------------------------------------------------------------------


def _norms(stage: int) -> dict[str, float]:
    twin = _twin(stage)
    twin.backward(0)
    want = torch.nn.utils.get_total_norm([p.grad for p in twin.theirs.values() if p.grad is not None])
    errors = {"first": abs(twin.share.grad_norm() / want - 1).item()}
    with twin.mesh.recording(CommRecorder()) as recorder:
        errors["again"] = abs(twin.training.grad_norm() / want - 1).item()
    errors["sent again"] = sum(recorder.calls.values())
    if stage == 1:
        twin.each(lambda _, ps: ps["p1"].grad.mul_(3))  # type: ignore[union-attr]
        want = torch.nn.utils.get_total_norm([p.grad for p in twin.theirs.values() if p.grad is not None])
        errors["edited"] = abs(twin.share.grad_norm() / want - 1).item()
        # Each takes the place of the one before the last.
        for _ in range(6):
            twin.each(lambda _, ps: setattr(ps["p1"], "grad", ps["p1"].grad * 2))  # type: ignore[operator]
            twin.each(lambda _, ps: setattr(ps["p1"], "grad", ps["p1"].grad * 2))  # type: ignore[operator]
            want = torch.nn.utils.get_total_norm([p.grad for p in twin.theirs.values() if p.grad is not None])
            errors["replaced"] = max(errors.get("replaced", 0.0), abs(twin.share.grad_norm() / want - 1).item())
    twin.backward(1)
    want = torch.nn.utils.get_total_norm([p.grad for p in twin.theirs.values() if p.grad is not None])
    errors["second pass"] = abs(twin.share.grad_norm() / want - 1).item()
    twin.zero_grad()
    errors["none"] = twin.share.grad_norm().item()
    return errors


@stages
def test_the_norm_is_that_of_one_process_and_sent_once(pools: Pools, stage: int) -> None:
    for errors in pools(4).run(_with_buckets_of, 32, _norms, stage):
        assert not {what: error for what, error in errors.items() if not error < 1e-12}


def _clipped(stage: int, kind: str, dtype: torch.dtype | None) -> float:
    mesh = TEDMesh(Topology(dist.get_world_size()))
    exact = dtype is None

    def make(parameters: dict[str, Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters.values(), lr=0.1, momentum=0.9)

    twin = Twin(
        mesh, make, SHAPES, torch.float64 if exact else torch.float32, zero_stage=stage, tile_size=32, working=dtype
    )
    for step in range(3):
        twin.zero_grad()
        twin.backward(step)
        if not exact:
            # The oracle steps what 16-bit gradients hold, which is gathered here.
            for name, parameter in twin.theirs.items():
                gradient = twin.share.local_gradient(twin.ours[name])
                assert gradient is not None and gradient.dtype == dtype
                parameter.grad = gradient.float()
        grads = [p.grad for p in twin.theirs.values() if p.grad is not None]
        if "scaled" in kind:
            factor = torch.tensor(0.25, dtype=torch.float64)
            twin.share.scale_gradients(factor)
            torch._foreach_mul_(grads, 0.25)
        if "norm" in kind:
            twin.share.clip_by_norm(0.5)
            torch.nn.utils.clip_grad_norm_(twin.theirs.values(), 0.5)
            assert abs(twin.share.grad_norm().item() - 0.5) < 1e-5
        else:
            twin.share.clip_by_value(0.125)
            torch.nn.utils.clip_grad_value_(twin.theirs.values(), 0.125)
        twin.step()
    if exact:
        return twin.error()
    masters = {name: twin.share.gather_master(parameter) for name, parameter in twin.ours.items()}
    return max((masters[name] - p.detach()).abs().max().item() for name, p in twin.theirs.items())  # type: ignore[operator]


@stages
@pytest.mark.parametrize("kind", ["norm", "value", "scaled norm", "scaled value"])
def test_clipped_steps_are_those_of_one_process(pools: Pools, stage: int, kind: str) -> None:
    assert all(error < 1e-12 for error in pools(2).run(_clipped, stage, kind, None))
    # Gradients in 16 bits are scaled and clipped in 32.
    assert all(error < 1e-6 for error in pools(2).run(_clipped, stage, kind, torch.bfloat16))
