"""Torch's fused kernels, for optimizers that leave the choice to torch: which does not take them by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Adam, AdamW, Optimizer


@contextmanager
def fused_where_possible(optimizer: Optimizer, device: torch.device) -> Iterator[None]:
    """Groups that leave the choice of an implementation to torch step fused within the context."""
    chosen = fused_groups(optimizer, device)
    for group in chosen:
        group["fused"] = True
    try:
        yield
    finally:
        for group in chosen:
            group["fused"] = None


def fused_groups(optimizer: Optimizer, device: torch.device) -> list[dict[str, Any]]:
    """The groups that may step fused and do not say how they want to step."""
    # Not SGD: fused, the momentum of all parameters has to begin in the same step, and torch's kernel for CPUs leaves 16-bit
    # weights as they are.
    if not isinstance(optimizer, (Adam, AdamW)) or device.type not in ("cpu", "cuda"):
        return []
    return [
        group
        for group in optimizer.param_groups
        if group.get("fused", 0) is group.get("foreach", 0) is None
        and not group.get("differentiable")
        and all(parameter.is_floating_point() for parameter in group["params"])
    ]
