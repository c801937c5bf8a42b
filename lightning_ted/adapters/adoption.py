"""Finding what is foreign in a module."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lightning_ted.adapters import families  # noqa: F401  (registers them)
from lightning_ted.adapters.huggingface import adopt_experts, initialisers_of, named_models, plan_of
from lightning_ted.adapters.peft import initialisers_of_adapters, lora_layers
from lightning_ted.adapters.registry import adopt_registered


def adopt(module: nn.Module) -> None:
    """Give every foreign MoE block in a module what a strategy asks of it. What has it already is left alone.

    Raises:
        UnsupportedError: If a block's experts cannot be shared out.

    """
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


def foreign_models(module: nn.Module) -> list[str]:
    """The qualified names of models whose layers are not this package's, nor the user's."""
    return [name for name, _ in named_models(module)]
