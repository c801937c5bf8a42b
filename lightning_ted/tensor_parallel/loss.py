"""Cross-entropy of logits that are split over the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_ted.collectives.primitives import all_reduce
from lightning_ted.collectives.tensor import sum_shards
from lightning_ted.errors import PlanError
from lightning_ted.mesh import Axis
from lightning_ted.tensor_parallel.ranges import require_range


class VocabParallelCrossEntropyLoss(nn.CrossEntropyLoss):
    """:class:`torch.nn.CrossEntropyLoss` for logits ``[N, C / t, ...]``, as a column-parallel head leaves them.

    The whole logits never exist: the ranks exchange three numbers a token, its maximum, normaliser and target logit.
    """

    axis: Axis

    @classmethod
    def adopt(cls, loss: nn.CrossEntropyLoss, axis: Axis) -> None:
        """Make ``loss`` vocabulary-parallel."""
        loss.__class__ = cls
        loss.axis = axis  # type: ignore[assignment]

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of ``target`` (class numbers, shape of ``input`` without its class dimension).

        Raises:
            PlanError: If ``target`` holds probabilities.
            IndexError: If it holds a number that is neither a class nor ``ignore_index``.

        """
        if target.is_floating_point():
            raise PlanError("vocab_parallel_loss takes class numbers as `target`, not probabilities.")
        classes = 0 if input.dim() == 1 else 1
        logits_NC = input.movedim(classes, -1).float() if input.dtype.itemsize == 2 else input.movedim(classes, -1)
        local = logits_NC.shape[-1]
        require_range(target, local * self.axis.size, "class number of `target`", ignored=self.ignore_index)
        highest_N = all_reduce(logits_NC.detach().amax(-1), self.axis, "max")
        shifted_NC = logits_NC - highest_N.unsqueeze(-1)
        own = target - self.axis.rank * local
        foreign = (own < 0) | (own >= local)
        picked_N = shifted_NC.gather(-1, own.masked_fill(foreign, 0).unsqueeze(-1)).squeeze(-1).masked_fill(foreign, 0)
        partial = [shifted_NC.exp().sum(-1), picked_N]
        weight_C = None if self.weight is None else self.weight.narrow(0, self.axis.rank * local, local)
        if self.label_smoothing:
            partial.append((shifted_NC if weight_C is None else shifted_NC * weight_C).sum(-1))
        total_N, picked_N, *smooth = sum_shards(torch.stack(partial), self.axis).unbind(0)
        log_total_N = total_N.log()

        kept_N = target != self.ignore_index
        weight_N = kept_N.to(log_total_N.dtype)
        if self.weight is not None:
            weight_N = weight_N * self.weight[target.masked_fill(~kept_N, 0)]
        loss_N = (log_total_N - picked_N) * weight_N
        if self.label_smoothing:
            count = local * self.axis.size
            mass = count if self.weight is None else self.weight.sum()
            even_N = (mass * log_total_N - smooth[0]).masked_fill(~kept_N, 0) / count
            loss_N = (1 - self.label_smoothing) * loss_N + self.label_smoothing * even_N
        if self.reduction == "none":
            return loss_N
        return loss_N.sum() if self.reduction == "sum" else loss_N.sum() / weight_N.sum()
