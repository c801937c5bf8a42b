"""Memory of the host that a device copies from and to."""

from __future__ import annotations

import torch
from torch import Tensor


def host_zeros(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros in host memory, ``[count]``; pinned if ``device`` is a GPU, which then copies while it computes."""
    return torch.zeros(count, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")
