"""Buckets: parameters whose gradients are reduced together, and whose steps and weights are shared out together.

Note [Who holds what]
    A bucket lies on the axis over which its gradients are summed; each rank of the axis owns one shard of it. A
    ``SharedBucket`` keeps the working weights of its parameters in one flat tensor, which their ``data`` views, so that
    updated shards are gathered in place; and, while there are any, their gradients in another, which their ``grad`` views.
    After the reduction a rank's gradients are right on its shard and zero elsewhere (``zero_stage=1``), or kept for its
    shard only (``zero_stage=2``). A ``LocalBucket`` lies on an axis of one rank: nothing is sent, flat or copied.

Note [Two passes without a step in between]
    Gradients that have been reduced must not be reduced again: what the second pass adds is summed by itself, and what the
    first has summed is carried over it.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_ted.mesh import Axis
from lightning_ted.optim.host import host_zeros
from lightning_ted.optim.placement import Placement


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of one parameter that this rank owns.

    Attributes:
        index: The parameter's place in its bucket.
        start: First element of the flattened (local) parameter.
        stop: The one behind the last.
        offset: Where the piece begins in this rank's shard.

    """

    index: int
    start: int
    stop: int
    offset: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.stop - self.start

    @property
    def in_shard(self) -> slice:
        """Where the piece lies in this rank's shard."""
        return slice(self.offset, self.offset + self.size)


class Bucket(ABC):
    """Parameters of one optimizer, family, dtype and device.

    Args:
        parameters: The parameters; contiguous.
        placement: Where they lie in flat memory.
        axis: Over which their gradients are summed.
        divisor: By what the sums are divided.
        working: 16-bit dtype of the weights that the model computes with, of which this rank keeps its shard in 32 bits,
            too, as ``masters``. None for the parameters' own, which are their own masters.
        grad_dtype: Dtype in which gradients are accumulated and reduced.
        offload: Keep masters, and what an optimizer keeps for their elements, in host memory.
        frees: Whether gradients are freed that are of no use any more: outside of this rank's shard when they have been
            reduced, and all of them after a step.

    Attributes:
        arrived: How many gradients each parameter has got in this pass.
        missing: How many trained parameters have not got any yet.
        started: Whether this pass's reduction has been started.
        pending: Whether there are gradients that have not been reduced.
        masters: This rank's shard of the weights that the optimizer steps, ``[shard]``; None if these are the working ones.

    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        placement: Placement,
        axis: Axis,
        divisor: int,
        working: torch.dtype | None,
        grad_dtype: torch.dtype,
        offload: bool = False,
        frees: bool = False,
    ) -> None:
        self.parameters = list(parameters)
        self.placement = placement
        self.axis = axis
        self.divisor = divisor
        self.grad_dtype = grad_dtype
        self.offload = offload
        self._frees = frees
        self._own_dtype = self.parameters[0].dtype
        self._has_masters = working is not None
        self._working = self._own_dtype if working is None else working
        self.pieces = [
            Piece(index, start, stop, placement.offsets[index] + start - placement.borders[axis.rank])
            for index, start, stop in placement.owned(axis.rank)
        ]
        self.arrived = [0] * len(self.parameters)
        self.missing = 0
        self.started = False
        self.pending = False
        self.masters: Tensor | None = None
        self._watched: list[weakref.ref[Tensor]] = []
        self._versions: list[int] = []
        self._acquired = False

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.parameters[0].device

    @property
    def is_active(self) -> bool:
        """Whether a pass can bring a gradient: some of its parameters are trained at present."""
        return any(parameter.requires_grad for parameter in self.parameters)

    # -- weights -------------------------------------------------------------------------------------------------------

    def absorb_changes(self) -> bool:
        """Follow whoever has changed the parameters in place (but not by way of ``data``, which leaves no trace) or replaced
        their data; returns whether they have been replaced."""
        if not self._acquired:
            return False
        replaced = self.claim_weights()
        if replaced or self._versions != self._current_versions():
            self.follow_weights()
        return replaced

    def follow_weights(self) -> None:
        """Let masters be the working weights where they are not the same, rounded."""
        self._versions = self._current_versions()
        if self.masters is None:
            return
        for piece in self.pieces:
            master = self.master_of(piece)
            weight = self.weight_of(piece).to(master.device)
            changed = weight != master.to(weight.dtype)
            master.copy_(torch.where(changed, weight.to(master.dtype), master))

    def _current_versions(self) -> list[int]:
        return [parameter._version for parameter in self.parameters]

    def update_masters(self, weights: Sequence[Tensor | None]) -> None:
        """Take over ``weights``, one of each parameter's shape or None to leave it, as masters; rounded, they are the
        working ones."""
        if self.masters is None:
            return
        for piece in self.pieces:
            weight = weights[piece.index]
            if weight is not None:
                self.master_of(piece).copy_(weight.reshape(-1)[piece.start : piece.stop])

    def master_of(self, piece: Piece) -> Tensor:
        """What an optimizer steps for a piece: flat, a view of the masters or of the working weight."""
        if self.masters is None:
            return self.weight_of(piece)
        return self.masters[piece.in_shard]

    def weight_of(self, piece: Piece) -> Tensor:
        """The working weight of a piece: flat, a view."""
        return self.parameters[piece.index].data.view(-1)[piece.start : piece.stop]

    @abstractmethod
    def claim_weights(self) -> bool:
        """See that the parameters' data are still what the bucket knows; whether they were not, and are again."""

    @abstractmethod
    def start_gathering_weights(self) -> None:
        """Send this rank's shard of the working weights to the others; :meth:`wait_for_weights` before they are read."""

    @abstractmethod
    def wait_for_weights(self) -> None:
        """Make the working weights those of the last step."""

    def acquire(self) -> None:
        """Make masters, and the parameters' data the working weights; if they are, follow who has changed them."""
        if self._acquired:
            self.absorb_changes()
            return
        if self._has_masters:
            count = self.placement.shards[self.axis.rank]
            dtype = torch.promote_types(self._own_dtype, torch.float32)
            if self.offload:
                self.masters = host_zeros(count, dtype, self.device)
            else:
                self.masters = torch.zeros(count, dtype=dtype, device=self.device)
            self.update_masters([parameter.data for parameter in self.parameters])
        self._take_weights()
        for parameter in self.parameters:
            # Which a parameter keeps, from an earlier run too; it takes none while there is a gradient of another one.
            if parameter.grad_dtype != self.grad_dtype:
                parameter.grad = None
                parameter.grad_dtype = self.grad_dtype
        self._versions = self._current_versions()
        self._acquired = True

    @abstractmethod
    def _take_weights(self) -> None:
        """Make the parameters' data the working weights."""

    def release(self) -> None:
        """Give the parameters back in their own dtype, until they are acquired again. A collective."""
        self.wait_for_weights()
        self.absorb_changes()
        if self.masters is not None:
            self.drop_gradients()
            self._give_back(self.masters)
            self.masters = None
            self._acquired = False

    @abstractmethod
    def _give_back(self, masters: Tensor) -> None:
        """Make the parameters' data what the masters are, in their own dtype."""

    # -- gradients -----------------------------------------------------------------------------------------------------

    def begin_pass(self) -> None:
        """Expect gradients; what has been reduced before is set aside."""
        self.arrived = [0] * len(self.parameters)
        self.missing = sum(parameter.requires_grad for parameter in self.parameters)
        self.started = False

    def take(self, index: int) -> None:
        """Note (and take into flat memory) the gradient that autograd has just left in a parameter."""
        self.missing -= self.arrived[index] == 0
        self.arrived[index] += 1
        self.pending = True

    @abstractmethod
    def is_present(self, index: int) -> bool:
        """Whether a parameter has a reduced gradient; the same on all ranks of the axis."""

    @abstractmethod
    def gradient_of(self, piece: Piece) -> Tensor | None:
        """The reduced gradient of a piece, flat, a view; None if its parameter has none."""

    @abstractmethod
    def drop_gradients(self) -> None:
        """Forget all gradients."""

    @abstractmethod
    def zero_gradients(self) -> None:
        """Make the gradients zero that are not in ``grad``."""

    def after_step(self) -> None:
        """Free what a step has used up."""
        if self._frees:
            self.drop_gradients()

    def _grad_of(self, piece: Piece) -> Tensor | None:
        """A piece of what is in ``grad``, flat, a view."""
        parameter = self.parameters[piece.index]
        if parameter.grad is None:
            return None
        _make_contiguous(parameter)
        return parameter.grad.detach().view(-1)[piece.start : piece.stop]

    def gradient_version(self) -> tuple[int, ...]:
        """Changes whenever gradients are changed in place or replaced."""
        for parameter in self.parameters:
            # On all ranks alike, whatever they own: they are to agree on whether something has changed.
            _make_contiguous(parameter)
        tensors = self._gradient_tensors()
        # References that are kept are told apart even if a tensor has come where another one was.
        self._watched = [weakref.ref(tensor) for tensor in tensors]
        return tuple(
            number
            for reference, tensor in zip(self._watched, tensors, strict=True)
            for number in (id(reference), tensor._version)
        )

    def _gradient_tensors(self) -> list[Tensor]:
        """What gradients may be read from."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]


def _make_contiguous(parameter: Parameter) -> None:
    """Replace a gradient that somebody has laid out in another way than its parameter."""
    if parameter.grad is not None and not parameter.grad.is_contiguous():
        parameter.grad = parameter.grad.detach().contiguous()
