"""A bucket on an axis of several ranks: see the notes in ``buckets.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ted.collectives.primitives import finish_reduce_scatter, start_all_gather_, start_reduce_scatter, wait
from lightning_ted.optim.buckets import Bucket, Piece


class SharedBucket(Bucket):
    """A bucket of several ranks."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._own = slice(*self.placement.borders[self.axis.rank : self.axis.rank + 2])
        self._gathering: Tensor | None = None
        self._grads: Tensor | None = None
        self._grad_views: list[Tensor] = []
        self._sum: Tensor | None = None  # this rank's shard of the reduced gradients
        self._sent: list[bool] = []  # which gradients this rank has had, when they were sent
        self._present = [False] * len(self.parameters)
        self._carried: Tensor | None = None
        self._carries = [False] * len(self.parameters)
        self._arriving: Tensor | None = None

    def _views(self, flat: Tensor) -> list[Tensor]:
        return [
            flat[offset : offset + parameter.numel()].view(parameter.shape)
            for offset, parameter in zip(self.placement.offsets, self.parameters, strict=True)
        ]

    # -- weights -------------------------------------------------------------------------------------------------------

    def _take_weights(self) -> None:
        self._weights = torch.zeros(self.placement.total, dtype=self._working, device=self.device)
        self._weight_views = self._views(self._weights)
        self.claim_weights()

    def claim_weights(self) -> bool:
        moved = False
        for parameter, view in zip(self.parameters, self._weight_views, strict=True):
            if parameter.data_ptr() != view.data_ptr() or parameter.dtype != view.dtype:
                view.copy_(parameter.data)
                parameter.data = view
                moved = True
        return moved

    def start_gathering_weights(self) -> None:
        if not any(self.is_present(i) or p.grad is not None for i, p in enumerate(self.parameters)):
            return  # on no rank of the axis, so nothing was stepped
        self._gathering = start_all_gather_(self._weights, self.placement.shards, self.axis)

    def wait_for_weights(self) -> None:
        if self._gathering is not None:
            wait(self._gathering)
            self._gathering = None

    def _give_back(self, masters: Tensor) -> None:
        flat = torch.empty(self._weights.shape, dtype=self._own_dtype, device=self.device)
        flat[self._own] = masters
        wait(start_all_gather_(flat, self.placement.shards, self.axis))
        self._weights, self._weight_views = flat, self._views(flat)
        for parameter, view in zip(self.parameters, self._weight_views, strict=True):
            parameter.data = view

    # -- gradients -----------------------------------------------------------------------------------------------------

    def begin_pass(self) -> None:
        super().begin_pass()
        if self._sum is None:
            return
        self._carries = [self._has_sum(index) for index in range(len(self.parameters))]
        if any(self._carries):
            self._carried = torch.zeros_like(self._sum)
            for piece in self.pieces:
                gradient = self.gradient_of(piece)
                if gradient is not None:
                    self._carried[piece.in_shard].copy_(gradient)
            for parameter in self.parameters:
                parameter.grad = None
        self._sum = None

    def _has_sum(self, index: int) -> bool:
        return self.parameters[index].grad is not None or (self._frees and self._present[index])

    @torch.no_grad()
    def take(self, index: int) -> None:
        super().take(index)
        if self._grads is None:
            self._allocate_gradients()
        parameter, view = self.parameters[index], self._grad_views[index]
        # From the second of several accumulating passes on, autograd adds to the view.
        if parameter.grad is not view:
            view.copy_(parameter.grad)  # type: ignore[arg-type]
            parameter.grad = view

    def _allocate_gradients(self) -> None:
        self._grads = torch.empty(self._weights.shape, dtype=self.grad_dtype, device=self.device)
        self._grad_views = self._views(self._grads)

    def has_gradient(self, index: int) -> bool:
        """Whether this rank knows a gradient of the parameter, from this pass or an earlier one."""
        # Reduced gradients may have been freed.
        there = self._sent[index] if self.started else self.parameters[index].grad is not None
        return self._carries[index] or there

    def start_reducing(self) -> int:
        """Begin to sum the gradients over the axis; returns their bytes."""
        self.started = True
        self._sent = [parameter.grad is not None for parameter in self.parameters]
        if self._grads is None:
            self._allocate_gradients()
        assert self._grads is not None
        for parameter, view in zip(self.parameters, self._grad_views, strict=True):
            if parameter.grad is None:
                view.zero_()
            elif parameter.grad is not view:
                view.copy_(parameter.grad)  # somebody has replaced it
        self._arriving = start_reduce_scatter(self._grads, self.placement.shards, self.axis, self.divisor)
        return self._grads.numel() * self._grads.element_size()

    def finish_reducing(self) -> None:
        """Wait for the sums."""
        if self._arriving is None:
            return  # dropped while they were on their way
        assert self._grads is not None
        own = self._grads[self._own]
        self._sum = torch.empty_like(own) if self._frees else own
        finish_reduce_scatter(self._arriving, self._sum, self.placement.shards, self.axis, self.divisor)
        self._arriving = None
        if self._carried is not None:
            self._sum.add_(self._carried)
        if self._frees:
            self._grads, self._grad_views = None, []
            for parameter in self.parameters:
                parameter.grad = None
        else:
            self._grads[: self._own.start].zero_()
            self._grads[self._own.stop :].zero_()

    def publish(self, present: Sequence[bool]) -> None:
        """Hand out the sums; ``present``: of which parameters some rank has a gradient."""
        self._present = list(present)
        if not self._frees and self._grads is not None:
            for parameter, view, there in zip(self.parameters, self._grad_views, present, strict=True):
                parameter.grad = view if there else None
        self._end_pass()

    def skip(self) -> None:
        """End a pass that has brought no rank a gradient, nor has one before it."""
        self.publish(self._carries)

    def _end_pass(self) -> None:
        self._carried, self._carries = None, [False] * len(self.parameters)
        self.pending = False

    def is_present(self, index: int) -> bool:
        return self._sum is not None and self._present[index]

    def gradient_of(self, piece: Piece) -> Tensor | None:
        grad = self._grad_of(piece)
        if grad is not None or not self._frees or self._sum is None or not self._present[piece.index]:
            return grad
        return self._sum[piece.in_shard]

    def _drop_arriving(self) -> None:
        """Let a pass that was broken off leave nothing behind."""
        if self._arriving is not None:
            wait(self._arriving)
            self._arriving = None

    def drop_gradients(self) -> None:
        self._drop_arriving()
        self._end_pass()
        self._sum = None
        for parameter in self.parameters:
            parameter.grad = None
        if self._frees:
            self._grads, self._grad_views = None, []

    def zero_gradients(self) -> None:
        self._drop_arriving()
        if self._frees and self._sum is not None:
            self._sum.zero_()
        self._carried = None

    def _gradient_tensors(self) -> list[Tensor]:
        own = [self._sum] if self._frees and self._sum is not None else []
        return [*super()._gradient_tensors(), *own]
