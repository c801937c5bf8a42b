"""Memory of the host that a device copies from and to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def host_zeros(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros in host memory, ``[count]``; pinned if ``device`` is a GPU, which then copies while it computes."""
    return torch.zeros(count, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")


def device_numbers(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host on a device, ``[len(numbers)]``, without waiting for what the device is doing."""
    pinned = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)
