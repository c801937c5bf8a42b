"""Experts whose weights peft has given low-rank adapters (``LoraConfig(target_parameters=...)``). Imported only where peft is.

Note [Low-rank products of experts]
peft would add ``scale * B_e A_e`` to the weights of all experts in every forward, as if all of them were here. Instead, an
expert's rows go through its two factors beside its weight: ``rows @ A_e.T @ B_e.T``, grouped products of width r, and no weight is
ever made. ``lora_A [E r, in]`` holds the experts' factors one after the other; in ``lora_B [out, r E]`` the number of the expert
runs fastest.

Beside the first projection, whose outputs are cut over the expert-tensor axis, B is cut with them, and A is whole: every rank of
the axis has the same rows, and of A's gradient the part that comes through its share of B. Beside the second, whose inputs are cut,
A is cut with them; B is whole, and its gradient is made of a partial product. Either factor that is whole is therefore handed over
to the shards itself (:func:`copy_to_shards`), which sums its gradient: as many numbers as it has, however many tokens there were.
What it makes could not be handed over instead, since the gradient of the rows is summed over the axis anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from peft.tuners.lora import layer as lora
from torch import Tensor, nn
from typing_extensions import override

from lightning_ted.adapters.huggingface import HuggingFaceExperts, is_experts
from lightning_ted.collectives.tensor import autocast_dtype, copy_to_shards
from lightning_ted.errors import UnsupportedError
from lightning_ted.layout import Cut
from lightning_ted.mesh import SINGLE
from lightning_ted.moe import MoE
from lightning_ted.moe.expert_parallel import ATTRIBUTE
from lightning_ted.moe.experts import Experts
from lightning_ted.topology import Topology


class AdaptedExperts(HuggingFaceExperts):
    """Experts under the library's contract, inside wrappers of peft's, to the outermost of which the layer belongs.

    Args:
        wrappers: All of them, the outermost first.
        experts: The module that keeps the contract, not cut yet.

    Raises:
        UnsupportedError: If the experts, or the adapters, are of a kind that cannot be shared out.

    """

    def __init__(self, wrappers: Sequence[Any], experts: Any) -> None:
        super().__init__(experts)
        for wrapper in wrappers:
            if wrapper.parameter_name not in (self._up, "down_proj"):
                raise UnsupportedError(
                    f"`target_parameters` names '{wrapper.parameter_name}' of {type(experts).__name__}; experts can have "
                    f"adapters for '{self._up}' and 'down_proj' only."
                )
            if not (self._transposed or getattr(wrapper, "_did_swap_in_out_features", False)):
                raise UnsupportedError(
                    f"The adapters of {type(experts).__name__} take its inputs for its outputs, as peft made them before 0.19. "
                    "Make them with a later one."
                )
        self._adapters = [
            ("base_layer." * depth, wrapper.parameter_name, {name: wrapper.r[name] for name in wrapper.lora_A})
            for depth, wrapper in enumerate(wrappers)
        ]

    @override
    def expert_cuts(self, topology: Topology) -> dict[str, tuple[Cut, ...]]:
        base = "base_layer." * len(self._adapters)
        own = super().expert_cuts(topology)
        cuts = {f"{base}{name}": cut for name, cut in own.items()}
        experts, degree = self.num_experts, topology.expert
        for prefix, name, ranks in self._adapters:
            across = own[name][1]
            for adapter, r in ranks.items():
                first = [Cut(0, "expert", degree, (experts * r,))]
                second = [Cut(1, "expert", degree, (experts,) * r)]
                if name == self._up:
                    second.append(Cut(0, "expert_tensor", across.degree, across.blocks))
                else:
                    first.append(Cut(1, "expert_tensor", across.degree, across.blocks))
                cuts[f"{prefix}lora_A.{adapter}.weight"] = tuple(first)
                cuts[f"{prefix}lora_B.{adapter}.weight"] = tuple(second)
        return cuts

    @override
    def partial_names(self) -> Iterable[str]:
        return ["base_layer." * len(self._adapters) + name for name in super().partial_names()]

    @override
    def experts_in(self, holder: nn.Module) -> Any:
        *_, experts = _chain(holder)
        return experts

    @override
    def low_rank(self, holder: nn.Module, name: str) -> Iterator[tuple[Tensor, Tensor, float]]:
        *wrappers, experts = _chain(holder)
        weight: Tensor = getattr(experts, name)
        shards = SINGLE if self.axes is None else self.axes.expert_tensor
        for wrapper, (_, _, ranks) in zip(wrappers, self._adapters, strict=True):
            if wrapper.parameter_name != name or wrapper.disable_adapters or wrapper.merged:
                continue
            for adapter in wrapper.active_adapters:
                if adapter not in wrapper.lora_A:
                    continue
                if self.axes is not None and adapter not in ranks:
                    raise UnsupportedError(
                        f"Adapter '{adapter}' of {type(experts).__name__} was made after the experts had been shared out, so it "
                        "holds the factors of all of them. Make it in `__init__` or `configure_model`."
                    )
                # As peft does: factors may be kept in another dtype than the weight.
                first = wrapper.lora_A[adapter].weight.to(weight.dtype)
                second = wrapper.lora_B[adapter].weight.to(weight.dtype)
                if name == self._up:
                    first = copy_to_shards(first, shards)
                else:
                    second = copy_to_shards(second, shards)
                first_eRI = first.view(len(weight), -1, first.shape[1])
                second_eOR = second.view(len(second), -1, len(weight)).permute(2, 0, 1).contiguous()
                # Zeros make rows of r features a length that the grouped GEMM multiplies.
                padding = -second_eOR.shape[2] % (16 // autocast_dtype(weight).itemsize)
                yield F.pad(first_eRI, (0, 0, 0, padding)), F.pad(second_eOR, (0, padding)), wrapper.scaling[adapter]


class ParamWrapper(lora.ParamWrapper):
    """A wrapper of peft's, which asks for it by this name, that leaves its products to the layer of the outermost one."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, **kwargs: Any
    ) -> Tensor:
        """As the experts inside: ``[T, D]``, ``[T, K]`` and ``[T, K]`` to ``[T, D]``."""
        self._check_forward_args(hidden_states, **kwargs)
        for wrapper in _chain(self)[:-1]:
            if wrapper.disable_adapters and wrapper.merged:
                wrapper.unmerge()
        layer: AdaptedExperts = self.__dict__[ATTRIBUTE]
        return layer.run(self, hidden_states, top_k_index, top_k_weights)

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:
        """What peft would add to the weight.

        Raises:
            UnsupportedError: If only a part of the experts is here.

        """
        first: Any = self.lora_A[adapter_name]
        if first.weight.shape[0] != self.r[adapter_name] * self.num_experts:
            raise UnsupportedError(
                f"Adapter '{adapter_name}' holds the factors of this rank's experts only, and cannot be merged into their weights. "
                "Load the checkpoint in one process, and merge there."
            )
        return super().get_delta_weight(adapter_name, *args, **kwargs)


def adopt_adapted_experts(root: nn.Module) -> None:
    """Let all experts under the contract that have adapters be run by :class:`AdaptedExperts`.

    Raises:
        UnsupportedError: If there are some that cannot be.

    """
    _refuse_own_experts(root)
    inner = {id(module.base_layer) for module in root.modules() if _is_wrapper(module)}
    for name, module in root.named_modules():
        layer: AdaptedExperts | None = module.__dict__.get(ATTRIBUTE)
        # One that has not been placed is made anew: there may be more adapters now.
        if not _is_wrapper(module) or id(module) in inner or (layer is not None and layer.axes is not None):
            continue
        *wrappers, experts = _chain(module)
        if not is_experts(experts):
            continue
        if getattr(experts.__dict__.get(ATTRIBUTE), "axes", None) is not None:
            raise UnsupportedError(
                f"The experts '{name}' got adapters after they had been shared out, so these have the shapes of one rank's part. "
                "Call peft in `__init__` or `configure_model`."
            )
        plain = (lora.ParamWrapper, ParamWrapper)
        others = [type(wrapper).__name__ for wrapper in wrappers if type(wrapper) not in plain]
        if others:
            raise UnsupportedError(
                f"The experts '{name}' have adapters of the kind {others[0]}; use LoRA: `LoraConfig(target_parameters=[...])`."
            )
        layer = AdaptedExperts(wrappers, experts)
        experts.__dict__.pop(ATTRIBUTE, None)  # no layer by itself any more
        for wrapper in wrappers:
            wrapper.__class__ = ParamWrapper
        module.__dict__[ATTRIBUTE] = layer


def _refuse_own_experts(root: nn.Module) -> None:
    for name, module in root.named_modules():
        if isinstance(module, MoE) and _is_wrapper(module.experts):
            raise UnsupportedError(
                f"`target_parameters` names weights of the experts of '{name}', a `MoE` of this package, which cannot have "
                "adapters. Give them to dense layers only, by `target_modules`, or train the experts whole, by `modules_to_save`."
            )


def _is_wrapper(module: Any) -> bool:
    """Whether peft has put a module around the weights of another one."""
    base = module._modules.get("base_layer")
    return base is not None and type(module).__module__.startswith(("peft.", __name__)) and _holds_experts(base)


def _holds_experts(module: nn.Module) -> bool:
    while "base_layer" in module._modules:
        module = module.base_layer  # type: ignore[assignment]
    return is_experts(module) or isinstance(module, Experts)


def _chain(module: Any) -> list[Any]:
    """A wrapper, those inside it, and what they are around."""
    chain = [module]
    while "base_layer" in chain[-1]._modules:
        chain.append(chain[-1].base_layer)
    return chain
