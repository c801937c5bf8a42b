"""The oracle is one process: train it, train the same under a layout, and compare everything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_ted.layout import ParamLayout
from lightning_ted.mesh import TEDMesh
from lightning_ted.optim.options import TrainingOptions
from lightning_ted.optim.step import ShardedStep
from lightning_ted.recompute import RecomputeOptions, checkpoint_blocks
from lightning_ted.strategy.partition import PartitionOptions, partition_module
from lightning_ted.topology import RankOrder, Topology
from tests.support.models import TinyConfig, TinyDecoder
from tests.support.reduced import training_of

STEPS = 3
#: Batch per data rank and sequence: 3 x 7 tokens predict, which no degree divides.
BATCH, SEQUENCE = 3, 8


@dataclass(frozen=True)
class Case:
    """One cell of the parity grid."""

    world: int
    tensor: int = 1
    expert: int = 1
    expert_tensor: int = 1
    order: RankOrder = "expert_first"
    mode: str = "dtd"  # dtd, undropped, sequence
    config: TinyConfig = TinyConfig()
    optimizer: str = "sgd"
    dtype: torch.dtype = torch.float32
    zero_stage: int = 1
    accumulate: int = 1
    tile_size: int | None = 2**24
    recompute: RecomputeOptions | None = None
    dispatcher: str = "all_to_all"
    chunks: int = 1

    @property
    def topology(self) -> Topology:
        return Topology(self.world, self.tensor, self.expert, self.expert_tensor, self.order)

    @property
    def options(self) -> PartitionOptions:
        split = self.mode == "sequence"
        return PartitionOptions("auto", split, self.mode != "undropped", self.dispatcher, self.chunks)

    def __str__(self) -> str:
        return f"w{self.world}-tp{self.tensor}-ep{self.expert}-etp{self.expert_tensor}-{self.order}-{self.mode}"


def layouts(world: int) -> Iterator[Case]:
    for tensor in (1, 2, 4):
        for expert in (1, 2, 4):
            for expert_tensor in sorted({1, tensor}):
                if tensor > world or expert * expert_tensor > world:
                    continue
                replicas = world // (expert * expert_tensor)
                for order in ("expert_first", "data_first") if expert > 1 and replicas > 1 else ("expert_first",):
                    for mode in ("dtd", "undropped", "sequence") if tensor > 1 else ("dtd",):
                        yield Case(world, tensor, expert, expert_tensor, order, mode)  # type: ignore[arg-type]


GRID = [case for world in (2, 4, 8) for case in layouts(world)]
#: An expert-tensor degree between 1 and the tensor degree.
GRID += [
    Case(world, 4, expert, 2, mode=mode)
    for world, expert in ((4, 2), (8, 2), (8, 4))
    for mode in ("dtd", "undropped", "sequence")
]


#: A part's place in the whole, and its squared error relative to the norm of the whole.
Part = tuple[tuple[tuple[str, int], ...], float]


@dataclass
class Outcome:
    """What is compared; gradients and weights by name: whole ones of one process, parts of a rank."""

    logits: Tensor
    norms: list[float]
    grads: dict[str, Tensor]
    weights: dict[str, Tensor] = field(default_factory=dict)


def build(config: TinyConfig, dtype: torch.dtype) -> TinyDecoder:
    # A well-conditioned start: here fp32 on one process stays within 6e-7 of fp64 itself; with other seeds, terms of the q/k
    # norms' gradients cancel and it does not stay within the tolerance of 1e-6.
    torch.manual_seed(3)
    return TinyDecoder(config).to(dtype)


def batches(config: TinyConfig, data: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    # a b a b ...: something that attention can learn. With random tokens the terms of its gradients cancel, and rounding with
    # different orders of summation is all that is left to compare.
    pairs = [torch.randint(config.vocab, (data * BATCH, 2), generator=generator) for _ in range(STEPS)]
    return [pair.repeat(1, SEQUENCE // 2) for pair in pairs]


def make_optimizer(name: str, module: nn.Module) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(module.parameters(), lr=0.1)
    # A large epsilon: Adam divides rounding errors of tiny gradients by themselves.
    return torch.optim.Adam(module.parameters(), lr=1e-2, eps=1e-3)


def train(
    module: TinyDecoder,
    data: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    backward: Callable[[Tensor, bool], None],
    norm: Callable[[], float],
    gradient: Callable[[str], Tensor | None],
    accumulate: int,
) -> Outcome:
    """Train, and keep what is compared."""
    outcome = Outcome(torch.empty(0), [], {})
    # A step of several passes costs as much as several steps.
    for step, tokens in enumerate(data if accumulate == 1 else data[:1]):
        optimizer.zero_grad()
        for index, micro in enumerate(tokens.chunk(accumulate)):
            logits, loss = module.step(micro)
            backward(loss / accumulate, index == accumulate - 1)
            if step == index == 0:
                outcome.logits = logits.detach()
        outcome.norms.append(norm())
        if step == 0:
            for name, _ in module.named_parameters():
                grad = gradient(name)
                assert grad is not None, f"{name} has no gradient"
                outcome.grads[name] = grad.clone()
        optimizer.step()
    outcome.weights = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    return outcome


@cache
def oracle(config: TinyConfig, data: int, optimizer: str, dtype: torch.dtype, accumulate: int) -> Outcome:
    """One process on the whole batch."""
    module = build(config, dtype)

    def together(tokens: Tensor) -> Tensor:
        """In each micro-batch, those of all data ranks."""
        return tokens.view(data, accumulate, -1, tokens.shape[1]).transpose(0, 1).flatten(0, 2)

    return train(
        module,
        [together(tokens) for tokens in batches(config, data)],
        make_optimizer(optimizer, module),
        backward=lambda loss, last: loss.backward(),
        norm=lambda: torch.nn.utils.get_total_norm([p.grad for p in module.parameters()]).item(),  # type: ignore[misc]
        gradient=lambda name: module.get_parameter(name).grad,
        accumulate=accumulate,
    )


def sharded(case: Case, mesh: TEDMesh) -> tuple[Outcome, dict[str, ParamLayout]]:
    """One rank of the same under a layout, on its share of the batch; and how the layout cuts."""
    module = build(case.config, case.dtype)
    layouts = partition_module(module, mesh, case.options)
    checkpoint_blocks(module, case.recompute)
    optimizer = make_optimizer(case.optimizer, module)
    options = TrainingOptions(case.zero_stage, case.tile_size)
    training = training_of(module, mesh, layouts, optimizer, case.options, options)
    share: ShardedStep = optimizer.sharded  # type: ignore[attr-defined]
    at = case.topology.coordinates(dist.get_rank())

    def backward(loss: Tensor, last: bool) -> None:
        with nullcontext() if last else training.reducer.blocked(), training.backward():
            loss.backward()

    outcome = train(
        module,
        [tokens.chunk(case.topology.data)[at.data] for tokens in batches(case.config, case.topology.data)],
        optimizer,
        backward=backward,
        norm=lambda: share.grad_norm().item(),
        gradient=lambda name: share.local_gradient(module.get_parameter(name)),
        accumulate=case.accumulate,
    )
    training.close()
    return outcome, layouts


def part_error(got: Tensor, whole: Tensor, layout: ParamLayout, mesh: TEDMesh) -> Part:
    """The error of this rank's part of ``whole``."""
    index: dict[str, int] = {cut.axis: mesh.axis(cut.axis).rank for cut in layout.cuts}
    part = layout.part(whole, index)
    assert got.shape == part.shape, f"{layout.name}: {tuple(got.shape)} for {tuple(part.shape)}"
    error = (got - part).norm() / whole.norm().clamp_min(1e-30)
    return tuple(sorted(index.items())), error.item() ** 2


def whole_error(ranks: Sequence[Part]) -> float:
    """The relative error of a tensor from its parts; of replicas, the worst one counts."""
    worst: dict[object, float] = {}
    for place, square in ranks:
        worst[place] = max(worst.get(place, 0.0), square) if square == square else square  # a NaN stays
    return sum(worst.values()) ** 0.5


def relative(got: Tensor, want: Tensor) -> float:
    """Relative error of a tensor, by norms."""
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()


def errors(case: Case, mesh: TEDMesh) -> dict[str, Part]:
    """Errors of this rank against one process, by what is compared."""
    torch.set_num_threads(1)
    got, layouts = sharded(case, mesh)
    want = oracle(case.config, case.topology.data, case.optimizer, case.dtype, case.accumulate)
    at = case.topology.coordinates(dist.get_rank())
    logits = want.logits.chunk(case.topology.data)[at.data]
    if case.config.vocab_parallel and case.tensor > 1:
        logits = logits.chunk(case.tensor, -1)[at.tensor]
    found: dict[str, Part] = {"logits": ((), relative(got.logits, logits) ** 2)}
    for kind, ours, theirs in (("grad", got.grads, want.grads), ("weight", got.weights, want.weights)):
        for name in theirs:
            found[f"{kind} {name}"] = part_error(ours[name], theirs[name], layouts[name], mesh)
    for step, (ours, theirs) in enumerate(zip(got.norms, want.norms, strict=True)):
        found[f"norm {step}"] = ((), ((ours - theirs) / theirs) ** 2)
    return found


def run_cases(cases: Sequence[Case]) -> list[dict[str, Part]]:
    """Errors of several cases, on one rank; those of one topology share their process groups."""
    # Nodes of two ranks, so that a hierarchical exchange has something to cross.
    meshes = {
        topology: TEDMesh(topology, ranks_per_node=2) for topology in dict.fromkeys(case.topology for case in cases)
    }
    return [errors(case, meshes[case.topology]) for case in cases]
