"""A user's own MoE blocks, by what a :class:`MoESpec` says of them.

The block keeps its router, its shared expert and its place; its forward becomes the routed computation of :mod:`foreign`. What the
block itself made of random tokens before is the proof: nothing is taken over that gives something else.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ted.adapters.foreign import ForeignExperts
from lightning_ted.adapters.networks import (
    ListedExperts,
    NetworkExperts,
    StackedExperts,
    attach,
    is_network,
    near,
    networks_of_list,
    networks_of_weights,
)
from lightning_ted.adapters.spec import MoESpec, require_matches
from lightning_ted.errors import SpecError
from lightning_ted.moe.expert_parallel import ATTRIBUTE

#: Under which attribute a block keeps its :class:`Routed`.
_ROUTED = "_ted_routed"
#: Sequences and tokens of each that a block is tried on.
_TRIED = (2, 5)


@dataclass
class Routed:
    """What a block's forward needs to know.

    Attributes:
        spec: What the user has said.
        top_k: To how many experts a token goes.
        holder: Path of the module that holds the experts' weights.
        logits: The shape in which the block returns the router's logits beside its output: ``"flat"`` ``[T, E]`` or ``"whole"``
            ``[..., E]``; None if it does not.

    """

    spec: MoESpec
    top_k: int
    holder: str
    logits: str | None = None


def adopt_blocks(root: nn.Module, specs: Sequence[MoESpec], complete: bool = True) -> None:
    """Share out the experts of all blocks that specs speak of.

    Args:
        root: The module.
        specs: What is said of its blocks.
        complete: False while the module has layers still to build; a spec may then fit nothing.

    Raises:
        SpecError: If one fits nothing, or not the block that it names.

    """
    if complete:
        require_matches(specs, root)
    for name, block in list(root.named_modules()):
        spec = next((spec for spec in specs if spec.matches(name, block)), None)
        if spec is not None and _ROUTED not in block.__dict__:
            _adopt(name, block, spec)


def _adopt(name: str, block: Any, spec: MoESpec) -> None:
    router, experts = spec.find(block, spec.router, "router"), spec.find(block, spec.experts, "experts")
    for path, what in ((spec.shared_expert, "shared_expert"), (spec.shared_expert_gate, "shared_expert_gate")):
        if path is not None:
            spec.find(block, path, what)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block_tried = _with_values(block)
        tokens = _tokens(block_tried, router, spec)
        tokens, want = _own_output(block_tried, tokens, spec)
        layer = _layer(block_tried, spec, tokens, want)
        if block_tried is not block:
            layer = _again(block, experts, spec, layer)
    routed = Routed(spec, spec.top_k_of(block), spec.experts, _logits_of(block_tried, tokens, want, spec))
    block.__dict__[_ROUTED] = routed
    block.forward = partial(_forward, block)


# -- the forward ---------------------------------------------------------------------------------------------------------------


def _forward(block: Any, hidden_states: Tensor) -> Any:
    """What the block makes of ``[..., D]``."""
    routed: Routed = block.__dict__[_ROUTED]
    tokens_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
    logits_TE = _logits(block, tokens_TD, routed.spec)
    out_TD = _output(block, tokens_TD, logits_TE, routed.spec, routed.top_k)
    out = out_TD.view(hidden_states.shape)
    if routed.logits is None:
        return out
    return out, logits_TE if routed.logits == "flat" else logits_TE.view(*hidden_states.shape[:-1], -1)


def _logits(block: Any, tokens_TD: Tensor, spec: MoESpec) -> Tensor:
    found = block.get_submodule(spec.router)(tokens_TD)
    return found[0] if isinstance(found, tuple) else found


def _output(block: Any, tokens_TD: Tensor, logits_TE: Tensor, spec: MoESpec, top_k: int) -> Tensor:
    weight_TK, expert_TK = _choice(logits_TE.float(), spec, top_k)
    holder = block.get_submodule(spec.experts)
    layer: ForeignExperts = holder.__dict__[ATTRIBUTE]
    out_TD = layer.run(holder, tokens_TD, expert_TK, weight_TK.to(tokens_TD.dtype))
    if spec.shared_expert is None:
        return out_TD
    shared_TD = block.get_submodule(spec.shared_expert)(tokens_TD)
    if spec.shared_expert_gate is not None:
        shared_TD = torch.sigmoid(block.get_submodule(spec.shared_expert_gate)(tokens_TD)) * shared_TD
    return out_TD + shared_TD


def _choice(logits_TE: Tensor, spec: MoESpec, top_k: int) -> tuple[Tensor, Tensor]:
    """Weights and experts ``[T, K]``."""

    def scores(logits: Tensor) -> Tensor:
        return logits.softmax(-1) if spec.score_function == "softmax" else logits.sigmoid()

    if spec.scores_of == "chosen":
        chosen_TK, expert_TK = logits_TE.topk(top_k, -1)
        weight_TK = scores(chosen_TK)
    else:
        weight_TK, expert_TK = scores(logits_TE).topk(top_k, -1)
    return (weight_TK / weight_TK.sum(-1, keepdim=True) if spec.normalize else weight_TK), expert_TK


# -- the proof -----------------------------------------------------------------------------------------------------------------


def _with_values(block: Any) -> Any:
    """The block, or a copy with random weights if it has no storage."""
    if not any(parameter.is_meta for parameter in block.parameters()):
        return block
    copied = copy.deepcopy(block).to_empty(device="cpu")
    for tensor in (*copied.parameters(), *copied.buffers()):
        if tensor.is_floating_point():
            tensor.normal_(std=0.5)
    return copied


def _tokens(block: Any, router: Any, spec: MoESpec) -> Tensor:
    weight = next(block.get_submodule(spec.router).parameters(), None)
    width = getattr(router, "in_features", None) or (
        weight.shape[-1] if weight is not None and weight.dim() > 1 else None
    )
    if width is None or weight is None:
        raise SpecError(
            f"`MoESpec(router={spec.router!r})` of {type(block).__name__} has no weight that tells how wide tokens are."
        )
    return torch.randn(*_TRIED, width, device=weight.device, dtype=weight.dtype)


def _own_output(block: Any, tokens: Tensor, spec: MoESpec) -> tuple[Tensor, Any]:
    """Tokens, in sequences if the block takes such, and what it makes of them.

    Raises:
        SpecError: If it cannot be asked, or would not answer the same in training.

    """
    try:
        with _mode(block, False):
            try:
                want = block(tokens)
            except Exception:  # whatever it asks of its input
                tokens = tokens.flatten(0, 1)
                want = block(tokens)
        with _mode(block, True), _without_dropout(block.get_submodule(spec.experts)):
            trained = [block(tokens), block(tokens)]
    except Exception as error:
        raise SpecError(
            f"{type(block).__name__}.forward(tokens {tuple(tokens.shape)}) failed ({type(error).__name__}: {error}). A block that "
            "a `MoESpec` describes takes hidden states alone; for others, use `register_moe_adapter`."
        ) from error
    first, *_ = want if isinstance(want, tuple) else (want,)
    for other in trained:
        found, *_ = other if isinstance(other, tuple) else (other,)
        if not isinstance(first, Tensor) or not near(found, first):
            raise SpecError(
                f"{type(block).__name__} does something else in training than in evaluation (noise of the router, dropout outside "
                "of experts, a capacity), which a `MoESpec` cannot say; use `register_moe_adapter`."
            )
    return tokens, want


@contextmanager
def _mode(block: nn.Module, training: bool) -> Iterator[None]:
    before = [(module, module.training) for module in block.modules()]
    block.train(training)
    try:
        yield
    finally:
        for module, was in before:
            module.training = was


@contextmanager
def _without_dropout(experts: nn.Module) -> Iterator[None]:
    found = _dropouts(experts)
    before = [module.p for module in found]
    for module in found:
        module.p = 0.0
    try:
        yield
    finally:
        for module, p in zip(found, before, strict=True):
            module.p = p


def _dropouts(experts: nn.Module) -> list[Any]:
    return [
        module for module in experts.modules() if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
    ]


def _layer(block: Any, spec: MoESpec, tokens: Tensor, want: Any) -> ForeignExperts:
    """Give a block the layer that makes of tokens what the block itself did.

    Raises:
        SpecError: If none does.

    """
    experts = block.get_submodule(spec.experts)
    flat_TD = tokens.reshape(-1, tokens.shape[-1])
    wanted = (want[0] if isinstance(want, tuple) else want).reshape(flat_TD.shape)
    holder: Any = experts
    with _mode(block, False):
        logits_TE = _logits(block, flat_TD, spec)
    if isinstance(experts, nn.ModuleList):
        make = _list_layer(experts, spec, flat_TD)
        holder = StackedExperts(experts)
        _replace(block, spec.experts, holder)
        layers: list[ForeignExperts] = [make(holder)]
    else:
        if _dropouts(experts):
            raise SpecError(
                f"{type(block).__name__} drops activations between fused weights; use `register_moe_adapter`."
            )
        networks = networks_of_weights(experts, tokens.shape[-1], spec.weights, spec.activation)
        layers = [NetworkExperts(experts, network) for network in networks]
    top_k = spec.top_k_of(block)
    with _mode(block, False):
        _require_number(block, spec, logits_TE, layers, top_k)
        for layer in layers:
            attach(holder, layer)
            if near(_output(block, flat_TD, logits_TE, spec, top_k), wanted):
                if holder is block and spec.shared_expert is not None:
                    layer.beside = (spec.shared_expert,)
                return layer
    holder.__dict__.pop(ATTRIBUTE, None)
    raise SpecError(_mismatch(block, spec, flat_TD, logits_TE, layers, wanted, top_k, holder))


def _list_layer(experts: nn.ModuleList, spec: MoESpec, tokens_TD: Tensor) -> Any:
    """Makes the layer of a list's experts once these are stacked: by grouped products if their network is known."""
    expert = experts[0]
    with _mode(expert, False):
        networks = [] if _dropouts(expert) else networks_of_list(expert, spec.activation)
        network = next((found for found in networks if is_network(expert, found, tokens_TD)), None)
    if network is not None:
        return partial(NetworkExperts, network=network)
    return partial(ListedExperts, expert=expert)


def _require_number(block: Any, spec: MoESpec, logits_TE: Tensor, layers: Sequence[ForeignExperts], top_k: int) -> None:
    kind = type(block).__name__
    if not layers:
        raise SpecError(
            f"`MoESpec(block={spec.block!r}, experts={spec.experts!r})`: {kind} holds no weights there that could be two or "
            "three layers of experts; name them in `weights`, or use `register_moe_adapter`."
        )
    experts = layers[0].num_experts
    if logits_TE.dim() != 2 or logits_TE.shape[1] != experts:
        raise SpecError(
            f"`MoESpec(block={spec.block!r}, router={spec.router!r})` makes {tuple(logits_TE.shape)} of {len(logits_TE)} tokens, "
            f"where logits of {experts} experts are wanted."
        )
    if top_k > experts:
        raise SpecError(f"`MoESpec(block={spec.block!r}, top_k={spec.top_k!r})` chooses {top_k} of {experts} experts.")


def _mismatch(
    block: Any,
    spec: MoESpec,
    tokens_TD: Tensor,
    logits_TE: Tensor,
    layers: Sequence[ForeignExperts],
    want_TD: Tensor,
    top_k: int,
    holder: Any,
) -> str:
    """What to say where nothing fits: other entries that would, if any do."""
    attempts = product(
        ("softmax", "sigmoid"), ("all", "chosen"), (False, True), range(1, min(logits_TE.shape[1], 4) + 1)
    )
    with _mode(block, False):
        for function, of, normalize, k in attempts:
            other = replace(spec, score_function=function, scores_of=of, normalize=normalize)  # type: ignore[arg-type]
            for layer in layers:
                attach(holder, layer)
                if near(_output(block, tokens_TD, logits_TE, other, k), want_TD):
                    holder.__dict__.pop(ATTRIBUTE, None)
                    return (
                        f"`MoESpec(block={spec.block!r})` does not give what {type(block).__name__} does. This would: "
                        f"score_function={function!r}, scores_of={of!r}, normalize={normalize}, top_k={k}."
                    )
    holder.__dict__.pop(ATTRIBUTE, None)
    return (
        f"`MoESpec(block={spec.block!r})` does not give what {type(block).__name__} does, with any network of two or three "
        "layers and any common score function. Is there a shared expert, a scale, a bias of the choice? Name what can be named, or "
        "use `register_moe_adapter`."
    )


def _again(block: Any, experts: Any, spec: MoESpec, layer: ForeignExperts) -> ForeignExperts:
    """The layer that a copy of a block has got, for the block without storage."""
    if isinstance(experts, nn.ModuleList):
        expert, holder = experts[0], StackedExperts(experts)
        _replace(block, spec.experts, holder)
        made: ForeignExperts = (
            NetworkExperts(holder, layer.network)
            if isinstance(layer, NetworkExperts)
            else ListedExperts(holder, expert)
        )
    else:
        assert isinstance(layer, NetworkExperts)
        holder, made = experts, NetworkExperts(experts, layer.network)
    made.beside = layer.beside
    attach(holder, made)
    return made


def _logits_of(block: Any, tokens: Tensor, want: Any, spec: MoESpec) -> str | None:
    """How the block returns the router's logits.

    Raises:
        SpecError: If it returns something else.

    """
    if not isinstance(want, tuple):
        return None
    with torch.no_grad(), _mode(block, False):
        logits_TE = _logits(block, tokens.reshape(-1, tokens.shape[-1]), spec)
    if len(want) == 2 and isinstance(want[1], Tensor) and want[1].numel() == logits_TE.numel():
        shape = tuple(want[1].shape)
        if near(want[1].reshape(logits_TE.shape), logits_TE):
            return "flat" if shape == tuple(logits_TE.shape) else "whole"
    raise SpecError(
        f"{type(block).__name__} returns {len(want)} values; beside its output, a block that a `MoESpec` describes may return the "
        "router's logits, from which losses can be computed. For others, use `register_moe_adapter`."
    )


def _replace(block: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(block.get_submodule(parent), leaf, module)
