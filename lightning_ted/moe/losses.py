"""Statistics of routing over the global batch, and the losses that are made of them.

Note [Global-batch statistics]
The load-balancing loss multiplies two averages, so the mean of per-rank losses is not the loss of the whole batch.
Every rank therefore sums counts and scores over all ranks first. All layers travel in one all-reduce. Its gradient is
an all-reduce over the data axis as well: each data rank's loss holds the same global term, and their gradients are
averaged afterwards. Tensor ranks that saw different tokens hold one copy of the loss together, so theirs are not added.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_ted.collectives.phase import dual
from lightning_ted.collectives.primitives import all_reduce
from lightning_ted.mesh import Axis
from lightning_ted.moe.expert_parallel import ExpertParallelLayer, expert_parallel_layers
from lightning_ted.moe.layer import MoE, moe_layers
from lightning_ted.moe.statistics import RoutingStatistics


class _SumStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, world: Axis, data: Axis) -> Tensor:
        ctx.data = data
        return all_reduce(packed, world)

    @staticmethod
    @dual
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return all_reduce(grad, ctx.data), None, None


Layer = TypeVar("Layer", bound=ExpertParallelLayer)
Ran = dict[str, tuple[Layer, RoutingStatistics]]


def _have_run(layers: Mapping[str, Layer]) -> Ran[Layer]:
    """The layers that have run, and what they saw."""
    found = ((name, layer, layer.statistics) for name, layer in layers.items())
    return {name: (layer, statistics) for name, layer, statistics in found if statistics is not None}


def _sum_over_ranks(ran: Ran[Layer]) -> list[Tensor]:
    """The packed statistics of every layer, summed over all ranks in one all-reduce."""
    if not ran:
        return []
    axes = next(layer.axes for layer, _ in ran.values())
    packed = [statistics.packed() for _, statistics in ran.values()]
    flat = torch.cat(packed)
    if axes is not None and axes.world.size > 1:
        flat = _SumStatistics.apply(flat, axes.world if axes.tokens_are_split else axes.data, axes.data)
    return list(flat.split([len(part) for part in packed]))


def _parts(packed: Tensor) -> tuple[Tensor, ...]:
    """Undoes :meth:`RoutingStatistics.packed`."""
    experts = (len(packed) - 3) // 2
    return packed.split([experts, experts, 1, 1, 1])


def _lost_its_graph(layer: MoE, statistics: RoutingStatistics) -> bool:
    trained = torch.is_grad_enabled() and layer.training and any(p.requires_grad for p in layer.router.parameters())
    return trained and not statistics.scores_E.requires_grad and not statistics.is_finished


def auxiliary_loss(module: nn.Module) -> Tensor:
    """The weighted load-balancing and z-losses of the last forward of every MoE layer, to be added to the loss.

    The load-balancing loss is ``E * sum_e f_e * p_e`` (Switch Transformer, arXiv 2101.03961, eq. 4; ``f`` the share of
    the assignments, ``p`` the mean score): 1 when the load is even, for every ``top_k``. The z-loss is the mean of
    ``logsumexp(logits)^2`` (ST-MoE, arXiv 2202.08906, eq. 5). Both are taken over the micro-batch of all ranks: value
    and gradient do not depend on the layout. Of a layer that runs twice in a forward, the last run counts. Every rank has
    to call it, once a forward.

    Raises:
        RuntimeError: If ``module`` has no MoE layer, or one that has not run yet, or that ran without a graph although its
            router is being trained.

    """
    layers = moe_layers(module)
    ran = _have_run(layers)
    if not layers:
        raise RuntimeError(f"{type(module).__name__} has no MoE layer, so it has no auxiliary loss.")
    for name in layers:
        if name not in ran:
            raise RuntimeError(f"MoE layer '{name}' has not run yet, so it has no auxiliary loss.")
        if _lost_its_graph(*ran[name]):
            raise RuntimeError(
                f"MoE layer '{name}' ran without gradients, so its auxiliary loss would not train the router. With activation "
                "checkpointing, use `use_reentrant=False`; in a forward under `torch.no_grad()`, leave the auxiliary loss out."
            )
    terms = []
    for (layer, statistics), sums in zip(ran.values(), _sum_over_ranks(ran), strict=True):
        counts_E, scores_E, z, _, tokens = _parts(sums)
        tokens = tokens.detach().clamp_min(1)
        share_E = counts_E.detach() / (tokens * statistics.top_k)
        balance = layer.num_experts * (share_E * scores_E / tokens).sum()
        terms.append(layer.aux_loss_coef * balance + layer.z_loss_coef * (z / tokens).sum())
    return torch.stack(terms).sum()


@torch.no_grad()
def expert_counts(module: nn.Module) -> dict[str, Tensor]:
    """Assignments of each expert in the last forward of every MoE layer, summed over all ranks: name to ``[E]``.

    Every rank has to call it.
    """
    return {name: counts_E for name, (counts_E, _, _) in _counted(module).items()}


@torch.no_grad()
def drop_rate(module: nn.Module) -> dict[str, Tensor]:
    """Share of the assignments that capacity dropped in the last forward of every MoE layer, over all ranks.

    Every rank has to call it.
    """
    return {name: dropped / assignments for name, (_, dropped, assignments) in _counted(module).items()}


def _counted(module: nn.Module) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Of every layer that has run, over all ranks: assignments of each expert, dropped ones, and all (1 at least)."""
    ran = _have_run(expert_parallel_layers(module))
    found = {}
    for (name, (_, statistics)), sums in zip(ran.items(), _sum_over_ranks(ran), strict=True):
        counts_E, _, _, dropped, tokens = _parts(sums.detach())
        found[name] = counts_E, dropped[0], (tokens[0] * statistics.top_k).clamp_min(1)
    return found
