"""Finding what is foreign in a module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from lightning_ted.adapters import families  # noqa: F401  (registers them)
from lightning_ted.adapters.blocks import adopt_blocks
from lightning_ted.adapters.huggingface import adopt_experts, initialisers_of, named_models, plan_of
from lightning_ted.adapters.networks import stacked_in
from lightning_ted.adapters.peft import initialisers_of_adapters, lora_layers
from lightning_ted.adapters.registry import adopt_registered
from lightning_ted.adapters.spec import MoESpec


def adopt(module: nn.Module, specs: Sequence[MoESpec] = (), complete: bool = True) -> None:
    """Give every foreign MoE block in a module what a strategy asks of it. What has it already is left alone.

    Args:
        module: The module.
        specs: What its user has said of blocks of their own.
        complete: False while it has layers still to build.

    Raises:
        UnsupportedError: If a block's experts cannot be shared out.
        SpecError: If a spec does not fit.

    """
    adopt_blocks(module, specs, complete)
    adopt_registered(module)
    if lora_layers() is not None:
        from lightning_ted.adapters.lora_experts import adopt_adapted_experts

        adopt_adapted_experts(module)
    adopt_experts(module)


def foreign_plan(module: nn.Module) -> dict[str, str]:
    """The tensor-parallel plans that foreign models bring along: name pattern to style."""
    return plan_of(module)


def initialisers(module: nn.Module) -> dict[int, Callable[[], object]]:
    """Of modules (by their ``id``) that foreign models initialise, or adapters in them, what does it."""
    return initialisers_of(module) | initialisers_of_adapters(module)


def stacked_experts(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Experts that had parameters of their own and have them together now: what a checkpoint has to tell of them."""
    return stacked_in(module)


def foreign_models(module: nn.Module) -> list[str]:
    """The qualified names of models whose layers are not this package's, nor the user's."""
    return [name for name, _ in named_models(module)]
