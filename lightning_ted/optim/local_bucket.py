"""A bucket on an axis of one rank: see the notes in ``buckets.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ted.optim.buckets import Bucket, Piece


class LocalBucket(Bucket):
    """A bucket that this rank has for itself."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self._carried: dict[int, Tensor] = {}
        self._reduced = False

    def acquire(self) -> None:
        super().acquire()
        for parameter in self.parameters:
            parameter.data = parameter.data.to(self._working)
        self._pointers: list[int] = []
        self.claim_weights()
        self._versions = self._current_versions()

    def claim_weights(self) -> bool:
        for parameter in self.parameters:
            if not parameter.is_contiguous():
                parameter.data = parameter.data.contiguous()
        pointers = [parameter.data_ptr() for parameter in self.parameters]
        moved = pointers != self._pointers
        self._pointers = pointers
        return moved

    def start_gathering_weights(self) -> None:
        """Nobody else holds them."""

    def wait_for_weights(self) -> None:
        """They are there."""

    def release(self) -> None:
        self.absorb_changes()
        if self.masters is None:
            return
        flat = {piece.index: self.master_of(piece) for piece in self.pieces}
        for index, parameter in enumerate(self.parameters):
            parameter.grad = None
            # One without elements has no piece.
            weight = flat.get(index, parameter.data).view(parameter.shape)
            parameter.data = weight.to(self.device, self._own_dtype, copy=True)
        self.masters = None

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

    def after_step(self) -> None:
        """Everything is the parameters' own."""
