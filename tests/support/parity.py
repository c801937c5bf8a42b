"""The oracle is one process: train it, train the same under a layout, and compare everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_ted.collectives.whole import gather_whole
from lightning_ted.mesh import TEDMesh
from lightning_ted.optim.clip import global_grad_norm
from lightning_ted.optim.gradients import GradientReducer
from lightning_ted.strategy.partition import PartitionOptions, partition_module
from lightning_ted.topology import RankOrder, Topology
from tests.support.models import TinyConfig, TinyDecoder

STEPS = 5
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

    @property
    def topology(self) -> Topology:
        return Topology(self.world, self.tensor, self.expert, self.expert_tensor, self.order)

    @property
    def options(self) -> PartitionOptions:
        return PartitionOptions("auto", self.mode == "sequence", self.mode != "undropped")

    def __str__(self) -> str:
        return f"w{self.world}-tp{self.tensor}-ep{self.expert}-etp{self.expert_tensor}-{self.order}-{self.mode}"


@dataclass
class Outcome:
    """What is compared; gradients and weights by name, whole."""

    logits: Tensor
    losses: list[float]
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
    reduce: Callable[[], None],
    norm: Callable[[], float],
    whole: Callable[[str, Tensor], Tensor],
) -> Outcome:
    """Train; ``whole`` makes the full tensor of a name from this rank's part."""
    outcome = Outcome(torch.empty(0), [], [], {})
    for step, tokens in enumerate(data):
        optimizer.zero_grad()
        logits, loss = module.step(tokens)
        loss.backward()
        reduce()
        outcome.losses.append(loss.item())
        outcome.norms.append(norm())
        if step == 0:
            outcome.logits = logits.detach()
            for name, parameter in module.named_parameters():
                assert parameter.grad is not None, f"{name} has no gradient"
                outcome.grads[name] = whole(name, parameter.grad)
        optimizer.step()
    outcome.weights = {name: whole(name, parameter.detach()) for name, parameter in module.named_parameters()}
    return outcome


@cache
def oracle(config: TinyConfig, data: int, optimizer: str, dtype: torch.dtype) -> Outcome:
    """One process on the whole batch."""
    module = build(config, dtype)
    return train(
        module,
        batches(config, data),
        make_optimizer(optimizer, module),
        reduce=lambda: None,
        norm=lambda: torch.nn.utils.get_total_norm([p.grad for p in module.parameters()]).item(),  # type: ignore[misc]
        whole=lambda name, tensor: tensor.clone(),
    )


def sharded(case: Case, mesh: TEDMesh) -> Outcome:
    """One rank of the same under a layout, on its share of the batch."""
    module = build(case.config, case.dtype)
    layouts = partition_module(module, mesh, case.options)
    reducer = GradientReducer(mesh, layouts, 1 if case.mode != "undropped" else case.tensor // case.expert_tensor)
    at = case.topology.coordinates(dist.get_rank())
    data = [tokens.chunk(case.topology.data)[at.data] for tokens in batches(case.config, case.topology.data)]

    def norm() -> float:
        return global_grad_norm([(p.grad, layouts[n]) for n, p in module.named_parameters()], mesh).item()  # type: ignore[misc]

    return train(
        module,
        data,
        make_optimizer(case.optimizer, module),
        reduce=lambda: reducer.reduce(list(module.named_parameters())),
        norm=norm,
        whole=lambda name, tensor: gather_whole(tensor, layouts[name], mesh),
    )


def relative(got: Tensor, want: Tensor) -> float:
    """Relative error of a tensor, by norms."""
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()


def errors(case: Case, mesh: TEDMesh) -> dict[str, float]:
    """Relative errors of this rank against one process, by what is compared; the worst of each kind is named."""
    torch.set_num_threads(1)
    got, want = sharded(case, mesh), oracle(case.config, case.topology.data, case.optimizer, case.dtype)
    at = case.topology.coordinates(dist.get_rank())
    logits = want.logits.chunk(case.topology.data)[at.data]
    if case.config.vocab_parallel and case.tensor > 1:
        logits = logits.chunk(case.tensor, -1)[at.tensor]
    found = {"logits": relative(got.logits, logits)}
    for kind, ours, theirs in (("grad", got.grads, want.grads), ("weight", got.weights, want.weights)):
        for name in theirs:
            found[f"{kind} {name}"] = relative(ours[name], theirs[name])
    for step, (ours, theirs) in enumerate(zip(got.norms, want.norms, strict=True)):
        found[f"norm {step}"] = abs(ours - theirs) / theirs
    return found


def run_cases(cases: Sequence[Case]) -> list[dict[str, float]]:
    """Errors of several cases, on one rank; those of one topology share their process groups."""
    meshes = {topology: TEDMesh(topology) for topology in dict.fromkeys(case.topology for case in cases)}
    return [errors(case, meshes[case.topology]) for case in cases]
