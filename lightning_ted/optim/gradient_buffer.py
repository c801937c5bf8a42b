"""The one buffer that the gradients of all tiles pass through."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor


class GradientBuffer:
    """The memory in which a tile's gradients get the masters' dtype and are scaled; those that need neither are not copied.

    Args:
        scale: By what they are multiplied.
        room: Elements of the largest tile: with a buffer that grew, a step would need both the old one and the new.

    """

    def __init__(self, scale: Tensor | None, room: int) -> None:
        self._scale = scale
        self._room = room
        self._memory: dict[torch.dtype, Tensor] = {}
        self._used: Counter[torch.dtype] = Counter()
        self._copies: list[tuple[Tensor, Tensor]] = []

    def clear(self) -> None:
        """Make room for a tile."""
        self._used.clear()
        self._copies.clear()

    def put(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        """The memory where the gradient will be, after :meth:`fill`."""
        if gradient.dtype == dtype and self._scale is None:
            return gradient
        memory = self._memory.get(dtype)
        if memory is None:
            memory = self._memory[dtype] = torch.empty(self._room, dtype=dtype, device=gradient.device)
        start = self._used[dtype]
        self._used[dtype] += gradient.numel()
        target = memory[start : start + gradient.numel()]
        self._copies.append((target, gradient))
        return target

    def fill(self) -> None:
        """Bring the gradients in."""
        if self._copies:
            torch._foreach_copy_([target for target, _ in self._copies], [gradient for _, gradient in self._copies])
        if self._scale is not None:
            for dtype, used in self._used.items():
                self._memory[dtype][:used].mul_(self._scale.to(torch.promote_types(dtype, torch.float32)))
