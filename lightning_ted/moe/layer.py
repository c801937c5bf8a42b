"""The mixture-of-experts layer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_ted.collectives.phase import in_backward
from lightning_ted.collectives.tape import after_recomputation
from lightning_ted.collectives.tensor import to_autocast
from lightning_ted.collectives.tokens import drop, restore
from lightning_ted.errors import TEDError, UnsupportedError
from lightning_ted.layout import Cut
from lightning_ted.mesh import SINGLE
from lightning_ted.moe.activations import ActivationName
from lightning_ted.moe.axes import MoEAxes
from lightning_ted.moe.capacity import limit_to_capacity
from lightning_ted.moe.dispatch import Dispatcher, make_dispatcher
from lightning_ted.moe.expert_parallel import ExpertParallelLayer
from lightning_ted.moe.experts import Experts
from lightning_ted.moe.router import TopKRouter
from lightning_ted.moe.routing import Routing, count_experts, keep_choice
from lightning_ted.moe.statistics import RoutingStatistics
from lightning_ted.tensor_parallel.randomness import RandomStream
from lightning_ted.topology import Topology


class MoE(nn.Module, ExpertParallelLayer):
    """A drop-in replacement of a feed-forward network: ``[..., d_model] -> [..., d_model]``.

    Runs whole on one device, and under tensor, expert and expert-tensor parallelism once a strategy has cut it.

    Args:
        d_model: Width of the tokens.
        d_ff: Hidden width of one expert.
        num_experts: Number of experts.
        top_k: Experts per token.
        activation: ``"swiglu"``, ``"gelu"`` or ``"relu"``.
        bias: Give the experts biases.
        capacity_factor: None routes every assignment (dropless). A number drops what exceeds
            ``ceil(tokens * top_k / num_experts * capacity_factor)`` assignments an expert; the pool of tokens is one
            data-parallel rank's micro-batch.
        score: ``"softmax"`` or ``"sigmoid"`` scores of the router.
        normalize_top_k: Divide a token's ``top_k`` weights by their sum.
        aux_loss_coef: Coefficient of the load-balancing loss in :func:`auxiliary_loss`.
        z_loss_coef: Coefficient of the router's z-loss in :func:`auxiliary_loss`.
        router: A router of your own: a module that maps tokens ``[T, D]`` to a :class:`Routing`; the arguments
            ``top_k``, ``score`` and ``normalize_top_k`` are then its own business, and refused here. Its choice for a
            token must depend on that token alone (and on noise): it may get any share of the batch.
        correction_bias: Let a bias, which ``ExpertBiasBalancing`` moves, have a part in the choice of experts.
        shared_expert: A dense branch ``[..., d_model] -> [..., d_model]`` through which every token goes as well; its output is
            added. It computes while tokens are under way to the experts of other ranks.

    Raises:
        TEDError: If an argument is out of its range, or given beside a router of your own.

    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        top_k: int = 2,
        activation: ActivationName = "swiglu",
        bias: bool = False,
        capacity_factor: float | None = None,
        score: Literal["softmax", "sigmoid"] = "softmax",
        normalize_top_k: bool = True,
        aux_loss_coef: float = 0.01,
        z_loss_coef: float = 0.0,
        router: nn.Module | None = None,
        shared_expert: nn.Module | None = None,
        correction_bias: bool = False,
    ) -> None:
        super().__init__()
        if capacity_factor is not None and not (_is_number(capacity_factor) and capacity_factor > 0):
            raise TEDError(f"`capacity_factor={capacity_factor!r}` must be positive, or None for dropless routing.")
        for argument, coefficient in (("aux_loss_coef", aux_loss_coef), ("z_loss_coef", z_loss_coef)):
            if not (_is_number(coefficient) and coefficient >= 0):
                raise TEDError(f"`{argument}={coefficient!r}` must be a number that is not negative.")
        if router is not None and not isinstance(router, nn.Module):
            raise TEDError(f"`router={router!r}` must be a module that maps tokens to a `lightning_ted.moe.Routing`.")
        if shared_expert is not None and not isinstance(shared_expert, nn.Module):
            raise TEDError(f"`shared_expert={shared_expert!r}` must be a module that maps tokens to tokens, or None.")
        idle = [
            ("top_k", top_k, 2),
            ("score", score, "softmax"),
            ("normalize_top_k", normalize_top_k, True),
            ("correction_bias", correction_bias, False),
        ]
        for argument, value, default in idle:
            if router is not None and value != default:
                raise TEDError(
                    f"`{argument}={value!r}` has no effect beside `router={router!r}`; give it to the router."
                )
        self.num_experts = num_experts
        self.capacity_factor = capacity_factor
        self.aux_loss_coef = aux_loss_coef
        self.z_loss_coef = z_loss_coef
        self.experts = Experts(num_experts, d_model, d_ff, activation, bias)
        if router is None:
            router = TopKRouter(d_model, num_experts, top_k, score, normalize_top_k, correction_bias)
        self.router = router
        self.shared_expert = shared_expert
        self.axes: MoEAxes | None = None
        self._statistics: RoutingStatistics | None = None
        self._recomputed: RoutingStatistics | None = None
        self._dispatcher: tuple[MoEAxes | None, Dispatcher] | None = None

    @property
    @override
    def statistics(self) -> RoutingStatistics | None:
        """What the last forward saw on this rank; inside a block that is being recomputed, what it sees there."""
        return self._recomputed if self._recomputed is not None and in_backward() else self._statistics

    @override
    def end_step(self) -> None:
        self._recomputed = None
        if self._statistics is not None:
            self._statistics = self._statistics.finished()

    @override
    def place(self, axes: MoEAxes) -> None:
        if axes.tokens_are_split and type(self.router) is not TopKRouter and self.axes is None:
            # A router that draws noise draws it for tokens that no other rank has.
            RandomStream.of_rank(axes.tensor).surround(self.router)
        self.axes = axes
        self.experts.tensor_axis = axes.expert_tensor

    @override
    def expert_cuts(self, topology: Topology) -> dict[str, tuple[Cut, ...]]:
        return {f"experts.{name}": cuts for name, cuts in self.experts.cuts(topology).items()}

    @override
    def widths(self) -> tuple[int, ...]:
        experts = self.experts
        return (experts.d_ff,) if experts.down_proj_bias is None else (experts.d_ff, experts.d_model)

    @override
    def partial_names(self) -> Iterable[str]:
        return ("router",) if self.axes is not None and self.axes.tokens_are_split else ()

    @override
    def shared_expert_names(self) -> Iterable[str]:
        return ("shared_expert",)

    @torch.compiler.disable(
        reason="a MoE layer reads on the host how many rows go where; compile its `experts` instead"
    )
    def forward(self, x: Tensor) -> Tensor:
        """``[..., d_model] -> [..., d_model]``. Is not compiled, whatever is compiled around it.

        Raises:
            TEDError: If the router returns no :class:`Routing`, or one of another number of experts.
            UnsupportedError: If ``x`` is a DTensor.

        """
        if hasattr(x, "device_mesh"):
            raise UnsupportedError(
                "the input of `MoE` is a DTensor; it takes a plain tensor of all tokens: `PrepareModuleInput(..., "
                "desired_input_layouts=(Replicate(),), use_local_output=True)`."
            )
        split = SINGLE if self.axes is None or not self.axes.drops else self.axes.tensor
        tokens_TD = x.reshape(-1, x.shape[-1])
        length = tokens_TD.shape[0]
        tokens_TD = drop(tokens_TD, split)
        chosen = self.router(tokens_TD)
        if not isinstance(chosen, Routing):
            raise TEDError(
                f"the router {type(self.router).__name__} returns a {type(chosen).__name__}; it has to return a "
                "`lightning_ted.moe.Routing`."
            )
        if chosen.logits_TE.shape[-1] != self.num_experts:
            raise TEDError(
                f"the router {type(self.router).__name__} chooses among {chosen.logits_TE.shape[-1]} experts, but "
                f"`num_experts={self.num_experts}`; make them equal."
            )
        # Whatever the router: rows that are replayed in a recomputation are those of the first choice.
        expert_TK = keep_choice(lambda: chosen.expert_TK)
        if expert_TK is not chosen.expert_TK:
            chosen = replace(chosen, expert_TK=expert_TK)
        routing = self._within_capacity(chosen, x.shape, length)
        self._note(self._measure(chosen, routing))
        beside: list[Tensor] = []

        def run_shared_expert() -> None:
            if self.shared_expert is not None:
                beside.append(self.shared_expert(x))

        # In the precision of the experts: what is sent is as wide as what is multiplied.
        if self._dispatcher is None or self._dispatcher[0] is not self.axes:
            self._dispatcher = self.axes, make_dispatcher(self.axes)
        out_TD = self._dispatcher[1](to_autocast(tokens_TD), routing, self.experts, run_shared_expert)
        out = restore(out_TD, length, split).to(x.dtype).view(x.shape)
        return out + beside[0] if beside else out

    def _within_capacity(self, routing: Routing, shape: torch.Size, tokens: int) -> Routing:
        if self.capacity_factor is None:
            return routing
        axes, batch = self.axes, 1
        if axes is not None and axes.sequence is not None:
            # Sequence parallelism has split every sequence, so they have to be told apart.
            if len(shape) < 3:
                raise TEDError(
                    f"`capacity_factor={self.capacity_factor}` with `sequence_parallel=True` takes [batch, sequence, width], "
                    f"not {tuple(shape)}; leave the sequences apart, or set `capacity_factor=None`."
                )
            tokens, batch = axes.sequence.length, math.prod(shape[:-2])
        tensor = axes.tensor if axes is not None and axes.tokens_are_split else SINGLE
        return limit_to_capacity(routing, self.num_experts, self.capacity_factor, tokens, batch, tensor)

    def _measure(self, chosen: Routing, routing: Routing) -> RoutingStatistics:
        """The statistics of what the router chose, and of what capacity left of it."""
        limited = routing is not chosen
        counts_E = count_experts(chosen.expert_TK, self.num_experts)
        return RoutingStatistics(
            counts_E=counts_E,
            scores_E=chosen.scores_TE.sum(0),
            z=chosen.logits_TE.logsumexp(-1).square().sum(),
            dropped=counts_E.sum() - (routing.expert_TK < self.num_experts).sum()
            if limited
            else counts_E.new_zeros(()),
            tokens=chosen.expert_TK.shape[0],
            top_k=chosen.expert_TK.shape[1],
        )

    def _note(self, statistics: RoutingStatistics) -> None:
        if in_backward():
            # A recomputation sees nothing new, and need not be that of the last forward; but a block that adds its own
            # auxiliary loss has to find again what it found.
            self._recomputed = statistics
            after_recomputation(self._forget_recomputed)
        else:
            self._statistics, self._recomputed = statistics, None

    def _forget_recomputed(self) -> None:
        self._recomputed = None

    def __getstate__(self) -> dict[str, Any]:
        # Statistics belong to one forward and carry its graph, which cannot be copied; a dispatcher may hold what cannot.
        return {**self.__dict__, "_statistics": None, "_recomputed": None, "_dispatcher": None}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def moe_layers(module: nn.Module) -> dict[str, MoE]:
    """The MoE layers of a module by qualified name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, MoE)}
