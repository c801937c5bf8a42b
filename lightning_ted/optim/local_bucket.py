"""A bucket on an axis of one rank: see the notes in ``buckets.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_ted.optim.buckets import Bucket, Piece


class LocalBucket(Bucket):
    """A bucket that this rank has for itself."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._pointers: list[int] = []
        self._carried: dict[int, Tensor] = {}
        self._reduced = False

    def _take_weights(self) -> None:
        self.claim_weights()

    def claim_weights(self) -> bool:
        for parameter in self.parameters:
            if parameter.dtype != self._working or not parameter.is_contiguous():
                parameter.data = parameter.data.to(self._working).contiguous()
        pointers = [parameter.data_ptr() for parameter in self.parameters]
        moved = pointers != self._pointers
        self._pointers = pointers
        return moved

    def start_gathering_weights(self) -> None:
        """Nobody else holds them."""

    def wait_for_weights(self) -> None:
        """They are there."""

    def _give_back(self, masters: Tensor) -> None:
        flat = {piece.index: self.master_of(piece) for piece in self.pieces}
        for index, parameter in enumerate(self.parameters):
            # One without elements has no piece.
            weight = flat.get(index, parameter.data).view(parameter.shape)
            parameter.data = weight.to(self.device, self._own_dtype, copy=True)

    def begin_pass(self) -> None:
        super().begin_pass()
        # A sum over one rank that is not divided may be added to.
        if self._reduced and self.divisor > 1:
            for index, parameter in enumerate(self.parameters):
                if parameter.grad is not None:
                    self._carried[index], parameter.grad = parameter.grad, None
        self._reduced = False

    @torch.no_grad()
    def reduce(self) -> None:
        """End a pass."""
        grads = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if self.divisor > 1 and grads:
            torch._foreach_div_(grads, self.divisor)
        for index, carried in self._carried.items():
            parameter = self.parameters[index]
            parameter.grad = carried if parameter.grad is None else parameter.grad.add_(carried)
        self._carried.clear()
        self._reduced, self.pending = True, False

    def is_present(self, index: int) -> bool:
        return self.parameters[index].grad is not None

    def gradient_of(self, piece: Piece) -> Tensor | None:
        return self._grad_of(piece)

    def drop_gradients(self) -> None:
        self.pending = False
        self._carried.clear()
        for parameter in self.parameters:
            parameter.grad = None

    def zero_gradients(self) -> None:
        self._carried.clear()
