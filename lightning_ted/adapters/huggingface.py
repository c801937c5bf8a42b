"""Mixture-of-experts models of Hugging Face's transformers, which stay as they are.

Four public surfaces of the library are touched, all of them here: the registry of experts' implementations, ``tp_plan``, the
loading and the undoing of weight conversions. transformers is imported only where a model of its is there.

Note [The contract of experts]
A module that the library's ``use_experts_implementation`` decorates maps ``hidden_states [T, D]``, ``top_k_index [T, K]`` and
``top_k_weights [T, K]`` to ``[T, D]`` with fused weights, of which five flags tell how they lie. Block, router, shared experts,
recorder of router logits and auxiliary loss are the model's own, and none of them sees that experts are elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_ted.adapters.foreign import ForeignExperts
from lightning_ted.errors import LayoutError, PlanError, UnsupportedError
from lightning_ted.layout import Cut
from lightning_ted.mesh import SINGLE
from lightning_ted.moe.activations import ACTIVATIONS, Activation
from lightning_ted.moe.expert_parallel import ATTRIBUTE
from lightning_ted.moe.experts import Groups
from lightning_ted.tensor_parallel.plan import STYLES
from lightning_ted.topology import Topology

#: The name under which the library calls experts of this package.
IMPLEMENTATION = "ted"
_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
#: The library's class, and torch's.
_SILU = ("SiLUActivation", "SiLU")
_AS_IT_IS = Activation(lambda hidden: hidden, lambda grad, hidden: grad)


def is_experts(module: nn.Module) -> bool:
    """Whether a module keeps the contract of experts."""
    return all(flag in module.__dict__ for flag in _FLAGS) and hasattr(module.__dict__.get("config"), "to_dict")


class HuggingFaceExperts(ForeignExperts):
    """Experts under the library's contract.

    Args:
        module: The module that keeps it, not cut yet.

    Raises:
        UnsupportedError: If its weights are quantized, or it keeps others than the contract names.

    """

    def __init__(self, module: Any) -> None:
        self._up = "gate_up_proj" if module.has_gate else "up_proj"
        weights = {name: getattr(module, name, None) for name in (self._up, "down_proj")}
        kind = type(module).__name__
        for name, weight in weights.items():
            if not isinstance(weight, nn.Parameter) or not weight.is_floating_point() or weight.dim() != 3:
                raise UnsupportedError(
                    f"{kind} keeps no floating-point `{name}` of three dimensions; quantized experts cannot be trained."
                )
        down: Tensor = module.down_proj
        super().__init__(down.shape[0])
        d_model, d_ff = down.shape[1:] if not module.is_transposed else reversed(down.shape[1:])
        self._d_model, self._d_ff = int(d_model), int(d_ff)
        self._post_norm: bool = getattr(module, "has_post_expert_norm", False)
        gate = getattr(type(module), "_apply_gate", None)
        is_plain = gate is None or gate.__name__ == "_default_apply_gate"
        self._is_swiglu = (
            module.has_gate and module.is_concatenated and is_plain and type(module.act_fn).__name__ in _SILU
        )
        if module.has_gate and gate is None and not self._is_swiglu:
            raise UnsupportedError(
                f"{kind} has gates of another kind than swiglu, and no `_apply_gate` that says which."
            )
        self._transposed: bool = module.is_transposed
        self._biased: bool = module.has_bias
        # Interleaved, a gate and its value are neighbours: consecutive features belong together, and are cut as one block.
        widening = 2 if module.has_gate else 1
        self._blocks = (self._d_ff,) * widening if module.is_concatenated else (self._d_ff * widening,)
        known = {self._up, "down_proj", *((f"{self._up}_bias", "down_proj_bias") if module.has_bias else ())}
        others = {name for name, _ in module.named_parameters(recurse=False)} - known
        if others:
            raise UnsupportedError(
                f"{kind} keeps '{min(others)}' beside the weights that the contract of experts names."
            )

    @override
    def widths(self) -> tuple[int, ...]:
        return (self._d_ff, self._d_model) if self._biased else (self._d_ff,)

    @override
    def check(self, name: str, topology: Topology) -> None:
        super().check(name, topology)
        if self._post_norm and topology.expert_tensor > 1:
            raise LayoutError(
                f"`expert_tensor_parallel_size={topology.expert_tensor}` cuts the experts of '{name}', whose outputs are "
                "normalised one by one and so have to be whole; set it to 1."
            )

    @override
    def expert_cuts(self, topology: Topology) -> dict[str, tuple[Cut, ...]]:
        over = Cut(0, "expert", topology.expert, (self.num_experts,))
        degree = topology.expert_tensor
        up, down = (2, 1) if self._transposed else (1, 2)
        cuts: dict[str, tuple[Cut, ...]] = {
            self._up: (over, Cut(up, "expert_tensor", degree, self._blocks)),
            "down_proj": (over, Cut(down, "expert_tensor", degree, (self._d_ff,))),
        }
        if self._biased:
            cuts[f"{self._up}_bias"] = (over, Cut(1, "expert_tensor", degree, self._blocks))
            # Cut over its features, not kept whole: added once however many shards there are.
            cuts["down_proj_bias"] = (over, Cut(1, "expert_tensor", degree, (self._d_model,)))
        return cuts

    @override
    def partial_names(self) -> Iterable[str]:
        # It sees the rows of other tensor ranks than this one's share, and not those of others.
        return ("post_expert_norm",) if self._post_norm and self.axes is not None and self.axes.tokens_are_split else ()

    @override
    def compute(
        self, holder: nn.Module, rows_ND: Tensor, counts_e: Tensor, sizes_e: list[int] | None, is_read: bool
    ) -> Tensor:
        module = self.experts_in(holder)
        groups = Groups(counts_e, rows_ND.shape[0], sizes_e)
        hidden_NH = groups.linear(rows_ND, self._lying(getattr(module, self._up)))
        for first_eRI, second_eOR, scale in self.low_rank(holder, self._up):
            hidden_NH = hidden_NH + groups.linear(groups.linear(rows_ND, first_eRI) * scale, second_eOR)
        hidden_NH = groups.bias(hidden_NH, getattr(module, f"{self._up}_bias") if self._biased else None)
        down = self._lying(module.down_proj)
        is_read = is_read or self._post_norm
        activation = ACTIVATIONS["swiglu"] if self._is_swiglu else _AS_IT_IS
        if not self._is_swiglu:
            hidden_NH = module._apply_gate(hidden_NH) if module.has_gate else module.act_fn(hidden_NH)
        out_ND = groups.activated_linear(hidden_NH, activation, down, is_read)
        for first_eRI, second_eOR, scale in self.low_rank(holder, "down_proj"):
            low_NR = groups.activated_linear(hidden_NH, activation, first_eRI) * scale
            out_ND = out_ND + groups.activated_linear(low_NR, _AS_IT_IS, second_eOR, is_read)
        shards = SINGLE if self.axes is None else self.axes.expert_tensor
        out_ND = groups.bias(out_ND, module.down_proj_bias if self._biased else None, shards)
        return module.post_expert_norm(out_ND) if self._post_norm else out_ND

    def experts_in(self, holder: nn.Module) -> Any:
        """The module that keeps the contract, in the one that the layer belongs to."""
        return holder

    def low_rank(self, holder: nn.Module, name: str) -> Iterable[tuple[Tensor, Tensor, float]]:
        """What is multiplied beside a weight: pairs of factors ``[experts, r, in]`` and ``[experts, out, r]``, and scales."""
        return ()

    def _lying(self, weight: Tensor) -> Tensor:
        """A weight as ``[experts, out, in]``."""
        return weight.transpose(1, 2) if self._transposed else weight


def forward_experts(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What the library calls; see Note [The contract of experts]."""
    layer: HuggingFaceExperts | None = module.__dict__.get(ATTRIBUTE)
    if layer is None:
        layer = HuggingFaceExperts(module)
        module.__dict__[ATTRIBUTE] = layer
    return layer.run(module, hidden_states, top_k_index, top_k_weights)


def adopt_experts(root: nn.Module) -> None:
    """Let all experts under the contract in a module be called by :func:`forward_experts`.

    Raises:
        UnsupportedError: If there are some that cannot be.

    """
    layers = [(module, module.__dict__.get(ATTRIBUTE)) for module in root.modules()]
    taken = {id(layer.experts_in(module)) for module, layer in layers if isinstance(layer, HuggingFaceExperts)}
    found = [module for module in root.modules() if is_experts(module) and id(module) not in taken]
    if not found:
        return
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, forward_experts)
    for module in found:
        module.__dict__[ATTRIBUTE] = HuggingFaceExperts(module)
    for _, model in named_models(root):
        model.set_experts_implementation(IMPLEMENTATION)
    for module in found:
        # A copy (peft's, of modules that are trained in whole) has a configuration of its own.
        module.config._experts_implementation = IMPLEMENTATION  # type: ignore[union-attr]


def named_models(root: nn.Module) -> list[tuple[str, Any]]:
    """The outermost models of the library, by name."""
    found: list[tuple[str, Any]] = []
    for name, module in root.named_modules():
        inside = any(f"{name}.".startswith(f"{outer}." if outer else "") for outer, _ in found)
        # Asked of the class: wrappers (peft's) hand on what they are asked for themselves.
        if not inside and hasattr(type(module), "set_experts_implementation"):
            found.append((name, module))
    return found


def initialisers_of(root: nn.Module) -> dict[int, Callable[[], object]]:
    """What gives the modules of the library's models, by their ``id``, their first values: the innermost model around each."""
    found: dict[int, Callable[[], object]] = {}
    for model in root.modules():
        if hasattr(type(model), "set_experts_implementation"):
            found |= {id(module): partial(_initialise, model, module) for module in model.modules()}
    return found


def _initialise(model: Any, module: Any) -> None:
    model._init_weights(module)
    own = getattr(type(module), "reset_parameters", None)
    if own is not None and not own.__module__.startswith(("torch.", "transformers.")):
        module.reset_parameters()  # a layer of the user's in such a model


# -- plans -----------------------------------------------------------------------------------------------------------------

#: Styles of the library that need nothing here: experts are cut by their flags, and parameters are local anyway.
_NEEDLESS = {"moe_tp_experts", "local_params", "replicate"}

_ATTENTION = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
}
#: Plans of models that come without one, or with one of their experts alone; names in the base model.
PLANS: dict[str, dict[str, str]] = {
    "gpt_oss": {**_ATTENTION, "layers.*.self_attn.sinks": "colwise"},
    "granitemoe": _ATTENTION,
    "granitemoe_swa": {**_ATTENTION, "layers.*.self_attn.sinks": "colwise"},
    "granitemoeshared": _ATTENTION,
    "granitemoehybrid": _ATTENTION,
    "phimoe": _ATTENTION,
    "jamba": {
        **_ATTENTION,
        "layers.*.feed_forward.gate_proj": "colwise",
        "layers.*.feed_forward.up_proj": "colwise",
        "layers.*.feed_forward.down_proj": "rowwise",
    },
    "lfm2_moe": {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.out_proj": "rowwise",
        "layers.*.self_attn.q_layernorm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_layernorm": "replicated_with_grad_allreduce",
        "layers.*.feed_forward.w1": "colwise",
        "layers.*.feed_forward.w3": "colwise",
        "layers.*.feed_forward.w2": "rowwise",
    },
}


def plan_of(root: nn.Module) -> dict[str, str]:
    """The tensor-parallel plan of every model of the library in a module: its own, and :data:`PLANS`.

    Raises:
        PlanError: If a plan of the library has a style that is not known here.

    """
    plan: dict[str, str] = {}
    for name, model in named_models(root):
        own = dict(model.tp_plan or {})
        base = "" if model.base_model is model else f"{model.base_model_prefix}."
        for pattern, style in PLANS.get(model.config.model_type, {}).items():
            own.setdefault(f"{base}{pattern}", style)
        if _has_tied_embeddings(model):
            own = {
                pattern: style for pattern, style in own.items() if "embedding" not in style and pattern != "lm_head"
            }
        for pattern, style in own.items():
            if style not in _NEEDLESS and not _is_of_experts(pattern, own):
                plan[f"{name}.{pattern}" if name else pattern] = _translated(style, pattern, model)
    return plan


def _is_of_experts(pattern: str, plan: Mapping[str, str]) -> bool:
    """Whether a pattern names weights of experts, which their flags tell how to cut."""
    return plan.get(pattern.rpartition(".")[0]) == "moe_tp_experts"


def _has_tied_embeddings(model: Any) -> bool:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is getattr(embedding, "weight", None)


def _translated(style: str, pattern: str, model: Any) -> str:
    if style == "mla_kv_a_proj":
        return f"{style}:{model.config.get_text_config().qk_rope_head_dim}"
    style = {"colwise_rep": "colwise_gather_output", "rowwise_rep": "rowwise_split_input"}.get(style, style)
    if style not in STYLES:
        raise PlanError(
            f"{type(model).__name__}'s own plan cuts '{pattern}' in the style '{style}', which is unknown here. Give a plan "
            "without it as `tensor_parallel_plan`."
        )
    return style
