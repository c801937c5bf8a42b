"""Sharded optimizers on gradients that a test makes up, without a model; and what torch's own makes of the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_ted.layout import Family, ParamLayout
from lightning_ted.mesh import TEDMesh
from lightning_ted.optim.options import TrainingOptions
from lightning_ted.optim.step import ShardedStep
from lightning_ted.strategy.partition import PartitionOptions
from lightning_ted.strategy.training import Training
from lightning_ted.topology import Topology

#: Odd sizes: without elements, without dimensions, one that is cut over ranks and tiles.
SHAPES: list[tuple[int, ...]] = [(1,), (3,), (0,), (33,), (10, 100), (), (7, 5)]


class Lion(Optimizer):
    """A third party's: one moment, and signs; its state is made when it is first wanted."""

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                mean = self.state[parameter].setdefault("exp_avg", torch.zeros_like(parameter))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(mean.lerp(parameter.grad, 1 - group["betas"][0]).sign_(), alpha=group["lr"])
                mean.lerp_(parameter.grad, 1 - group["betas"][1])


class Counting(Optimizer):
    """A third party's that counts its steps in the group, as schedule-free ones do, and makes new tensors of its weights."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "k": 0})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["k"] += 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter.data))
                    mean.lerp_(parameter.grad, 0.1)
                    parameter.data = parameter.data - mean * (group["lr"] / (1 - 0.9 ** group["k"]))


#: Every optimizer that steps elements one by one, with the settings that take another path.
ELEMENTWISE: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "Adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "AdamW amsgrad": (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True, "maximize": True}),
    "SGD": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1}),
    "SGD nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.01, "weight_decay": 0.1}),
    "RAdam": (torch.optim.RAdam, {"lr": 0.01}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01}),
    "RMSprop centered": (torch.optim.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.9}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.5, "lr_decay": 0.1}),
    "Adamax": (torch.optim.Adamax, {"lr": 0.01}),
    "Adadelta": (torch.optim.Adadelta, {"lr": 1.0}),
    "ASGD": (torch.optim.ASGD, {"lr": 0.1, "t0": 1.0}),
    "Rprop": (torch.optim.Rprop, {"lr": 0.01}),
    "Lion": (Lion, {"lr": 0.01, "weight_decay": 0.1}),
    "Counting": (Counting, {"lr": 0.1}),
}


def make_parameters(
    shapes: Iterable[tuple[int, ...]], dtype: torch.dtype = torch.float64, seed: int = 0
) -> dict[str, Parameter]:
    """Parameters ``p0``, ``p1``, ...; the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"p{index}": Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for index, shape in enumerate(shapes)
    }


def gradients(parameters: Mapping[str, Parameter], *seed: int) -> dict[str, Tensor]:
    """Gradients in float64 that depend on ``seed`` (of a rank, a step, ...) only."""
    generator = torch.Generator().manual_seed(hash(seed) % 2**31)
    return {name: torch.randn(p.shape, generator=generator, dtype=torch.float64) for name, p in parameters.items()}


def two_groups(parameters: Mapping[str, Parameter], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every second parameter with a rate of its own, and without weight decay where there is any."""
    values = list(parameters.values())
    other: dict[str, Any] = {"lr": settings["lr"] / 3} | ({"weight_decay": 0.0} if "weight_decay" in settings else {})
    return [{"params": values[::2]}, {"params": values[1::2], **other}]


def make_training(
    parameters: Mapping[str, Parameter],
    mesh: TEDMesh,
    optimizers: Sequence[Optimizer],
    *,
    zero_stage: int = 1,
    tile_size: int | None = None,
    families: Mapping[str, Family] | None = None,
    replication: Mapping[str, int] | None = None,
    working: torch.dtype | None = None,
    wide: bool = False,
    whole: bool = False,
    offload: bool = False,
) -> Training:
    """``optimizers``, sharded; parameters are dense and replicated everywhere if nothing else is said."""
    families, replication = families or {}, replication or {}
    layouts = {
        name: ParamLayout(
            name, tuple(p.shape), (), families.get(name, "dense"), replication.get(name, mesh.topology.world_size)
        )
        for name, p in parameters.items()
    }
    options = TrainingOptions(zero_stage, tile_size, offload, wide)
    device = next(iter(parameters.values())).device
    of_weights = {} if working is None else dict.fromkeys(parameters, working)
    training = Training(parameters, mesh, layouts, PartitionOptions(), options, of_weights, device)
    training.shard(optimizers, lambda _: whole)
    return training


class Twin:
    """An optimizer that is sharded, and the same one of torch's on one process, which see the same gradients.

    Args:
        mesh: The mesh; all of its ranks have batches of their own.
        make: Makes the optimizer of parameters by name.
        shapes: Of the parameters.
        dtype: Of the parameters.
        options: Of :func:`make_training`.

    """

    def __init__(
        self,
        mesh: TEDMesh,
        make: Callable[[dict[str, Parameter]], Optimizer],
        shapes: Iterable[tuple[int, ...]],
        dtype: torch.dtype = torch.float64,
        **options: Any,
    ) -> None:
        shapes = list(shapes)
        self.mesh = mesh
        self.ours, self.theirs = make_parameters(shapes, dtype), make_parameters(shapes, dtype)
        self.optimizer, self.oracle = make(self.ours), make(self.theirs)
        self.training = make_training(self.ours, mesh, [self.optimizer], **options)
        self.share: ShardedStep = self.optimizer.sharded  # type: ignore[attr-defined]

    def each(self, change: Callable[[Optimizer, dict[str, Parameter]], Any]) -> None:
        """Do the same to both."""
        change(self.optimizer, self.ours)
        change(self.oracle, self.theirs)

    def zero_grad(self, **options: bool) -> None:
        self.each(lambda optimizer, _: optimizer.zero_grad(**options))

    def backward(
        self, seed: int, last: bool = True, without: Callable[[int], Iterable[str]] = lambda rank: (), **options: Any
    ) -> None:
        """A pass with gradients of ``seed`` and the rank, on each rank ``without`` those of some parameters."""
        world = self.mesh.topology.world_size
        of_ranks = []
        for rank in range(world):
            found = gradients(self.theirs, seed, rank)
            absent = set(without(rank)) | {name for name, p in self.theirs.items() if not p.requires_grad}
            of_ranks.append({name: grad for name, grad in found.items() if name not in absent})
        backward(self.training, self.ours, of_ranks[self.mesh.rank], last, **options)
        for name, parameter in self.theirs.items():
            parts = [found[name] for found in of_ranks if name in found]
            if parts:
                grad = (torch.stack(parts).sum(0) / world).to(parameter.dtype)
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad

    def step(self) -> None:
        self.each(lambda optimizer, _: optimizer.step())

    def train(self, steps: int, seed: int = 0, accumulate: int = 1, **options: Any) -> None:
        """Steps, each of so many passes."""
        for step in range(steps):
            self.zero_grad()
            for index in range(accumulate):
                self.backward(1000 * seed + 10 * step + index, index == accumulate - 1, **options)
            self.step()

    def error(self) -> float:
        """The largest difference of the weights; NaN if somewhere there is one."""
        return max(
            (ours.detach().double() - self.theirs[name].detach().double()).abs().max().item()
            for name, ours in self.ours.items()
            if ours.numel()
        )


def mesh_of_world() -> TEDMesh:
    """All ranks, each with a batch of its own."""
    return TEDMesh(Topology(dist.get_world_size() if dist.is_initialized() else 1))


def adamw(parameters: dict[str, Parameter]) -> Optimizer:
    """With two groups."""
    return torch.optim.AdamW(two_groups(parameters, {"lr": 0.01, "weight_decay": 0.1}), lr=0.01, weight_decay=0.1)


def twin_of(stage: int = 1, make: Callable[[dict[str, Parameter]], Optimizer] = adamw, **options: Any) -> Twin:
    """A twin on all ranks, of parameters of odd sizes."""
    options = {"tile_size": 64, "shapes": SHAPES, **options}
    return Twin(mesh_of_world(), make, zero_stage=stage, **options)


def backward(
    training: Training,
    parameters: Mapping[str, Parameter],
    grads: Mapping[str, Tensor],
    last: bool = True,
    create_graph: bool = False,
) -> None:
    """A pass after which each parameter named in ``grads`` has got just that; synchronised if it is the ``last``."""
    # The sum begins with something that wants a gradient, if no parameter is used.
    loss = torch.zeros((), requires_grad=True)
    for name, grad in grads.items():
        loss = loss + (parameters[name] * grad.to(parameters[name].dtype)).sum()
    with nullcontext() if last else training.reducer.blocked(), training.backward():
        loss.backward(create_graph=create_graph)
