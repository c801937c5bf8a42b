"""Finding what is foreign in a module."""

from __future__ import annotations

from torch import nn

from lightning_ted.adapters.huggingface import adopt_experts, plan_of


def adopt(module: nn.Module) -> None:
    """Give every foreign MoE block in a module what a strategy asks of it. What has it already is left alone.

    Raises:
        UnsupportedError: If a block's experts cannot be shared out.

    """
    adopt_experts(module)


def foreign_plan(module: nn.Module) -> dict[str, str]:
    """The tensor-parallel plans that foreign models bring along: name pattern to style."""
    return plan_of(module)
