"""Statistics of routing over the global batch, and the losses that are made of them.

Note [Global-batch statistics]
The load-balancing loss multiplies two averages, so the mean of per-rank losses is not the loss of the whole batch.
Every rank therefore sums counts and scores over all ranks first. All layers travel in one all-reduce. Its gradient is
an all-reduce over the data axis as well: each data rank's loss holds the same global term, and their gradients are
averaged afterwards. Tensor ranks that saw different tokens hold one copy of the loss together, so theirs are not added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ted.collectives.primitives import all_reduce
from lightning_ted.mesh import SINGLE, Axis


@dataclass(frozen=True)
class RoutingStatistics:
    """What one forward of one layer saw on this rank.

    Attributes:
        counts_E: Assignments of each expert, before capacity.
        scores_E: Sum over tokens of the router's scores, differentiable.
        z: Sum over tokens of the squared log-sum-exp of the logits, differentiable.
        dropped: Assignments dropped by capacity.
        tokens: Number of tokens.
        top_k: Choices per token.

    """

    counts_E: Tensor
    scores_E: Tensor
    z: Tensor
    dropped: Tensor
    tokens: int
    top_k: int

    def packed(self) -> Tensor:
        """All sums as one vector ``[2 E + 3]``: counts, scores, z, dropped, tokens."""
        tokens = self.counts_E.new_tensor([self.tokens], dtype=self.scores_E.dtype)
        return torch.cat(
            [
                self.counts_E.to(self.scores_E.dtype),
                self.scores_E,
                self.z.view(1),
                self.dropped.view(1).to(tokens),
                tokens,
            ]
        )


class _SumStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, world: Axis, data: Axis) -> Tensor:
        ctx.data = data
        return all_reduce(packed, world)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return all_reduce(grad, ctx.data), None, None


def _moe_layers(module: nn.Module) -> dict[str, Any]:
    from lightning_ted.moe.layer import MoE

    return {name: layer for name, layer in module.named_modules() if isinstance(layer, MoE)}


def _sum_over_ranks(layers: list[Any]) -> list[Tensor]:
    """The packed statistics of every layer, summed over all ranks in one all-reduce."""
    axes = layers[0].axes
    packed = [layer.statistics.packed() for layer in layers]
    split = axes.tokens_are_split if axes is not None else False
    world, data = (SINGLE, SINGLE) if axes is None else (axes.world if split else axes.data, axes.data)
    flat = torch.cat(packed)
    if world.size > 1:
        flat = _SumStatistics.apply(flat, world, data)
    return list(flat.split([len(part) for part in packed]))


def auxiliary_loss(module: nn.Module) -> Tensor:
    """The weighted load-balancing and z-losses of the last forward of every MoE layer in ``module``, to be added to the
    loss.

    The load-balancing loss is ``E * sum_e f_e * p_e`` (Switch Transformer, arXiv 2101.03961, eq. 4; ``f`` the share of
    the assignments, ``p`` the mean score): 1 when the load is even, for every ``top_k``. The z-loss is the mean of
    ``logsumexp(logits)^2`` (ST-MoE, arXiv 2202.08906, eq. 5). Both are taken over the micro-batch of all ranks: value
    and gradient do not depend on the layout. Every rank has to call it, once a forward.

    Raises:
        RuntimeError: If a layer has not run since its last use.

    """
    layers = _moe_layers(module)
    if not layers:
        raise RuntimeError(f"{type(module).__name__} has no MoE layer, so it has no auxiliary loss.")
    for name, layer in layers.items():
        if layer.statistics is None:
            raise RuntimeError(f"MoE layer '{name}' has not run yet, so it has no auxiliary loss.")
    loss = None
    for layer, sums in zip(layers.values(), _sum_over_ranks(list(layers.values())), strict=True):
        experts = layer.num_experts
        counts_E, scores_E, z, _, tokens = sums.split([experts, experts, 1, 1, 1])
        tokens = tokens.detach().clamp_min(1)
        share_E = counts_E.detach() / (tokens * layer.statistics.top_k)
        term = layer.aux_loss_coef * experts * (share_E * scores_E / tokens).sum()
        term = term + layer.z_loss_coef * (z / tokens).sum()
        loss = term if loss is None else loss + term
    assert loss is not None
    return loss


@torch.no_grad()
def expert_counts(module: nn.Module) -> dict[str, Tensor]:
    """Assignments of each expert in the last forward of every MoE layer, summed over all ranks: name to ``[E]``.

    Every rank has to call it.
    """
    layers = {name: layer for name, layer in _moe_layers(module).items() if layer.statistics is not None}
    if not layers:
        return {}
    sums = _sum_over_ranks(list(layers.values()))
    return {name: part[: layer.num_experts].detach() for (name, layer), part in zip(layers.items(), sums, strict=True)}


@torch.no_grad()
def drop_rate(module: nn.Module) -> dict[str, Tensor]:
    """Share of the assignments that capacity dropped in the last forward of every MoE layer, over all ranks.

    Every rank has to call it.
    """
    layers = {name: layer for name, layer in _moe_layers(module).items() if layer.statistics is not None}
    if not layers:
        return {}
    sums = _sum_over_ranks(list(layers.values()))
    return {
        name: part[-2] / (part[-1] * layer.statistics.top_k).clamp_min(1)
        for (name, layer), part in zip(layers.items(), sums, strict=True)
    }
