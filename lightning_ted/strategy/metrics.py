"""Metrics are summed over the data-parallel ranks, not over the world: tensor peers saw the same samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_ted.errors import UnsupportedError
from lightning_ted.mesh import Axis


@dataclass(frozen=True)
class GatherOverData:
    """What a metric calls to collect its state from all ranks.

    An object and not a process group, because metrics are deep-copied and groups cannot be.
    """

    data_axis: Axis

    def __call__(self, result: Tensor, group: Any | None = None) -> list[Tensor]:
        """Every rank's ``result``, whose sizes may differ."""
        if group is not None:
            return gather_all_tensors(result, group)
        if self.data_axis.size == 1:
            return [result]
        return gather_all_tensors(result, self.data_axis.attached_group)


def synchronize_over_data(module: nn.Module, data_axis: Axis) -> None:
    """Let every torchmetrics metric in ``module`` that has neither a group nor a function of its own sum over data."""
    for metric in module.modules():
        if not isinstance(metric, Metric) or metric.process_group is not None:
            continue
        if metric.dist_sync_fn is None or isinstance(metric.dist_sync_fn, GatherOverData):
            metric.dist_sync_fn = GatherOverData(data_axis)


def reduce_over(tensor: Tensor, axis_group: Any, size: int, op: str) -> Tensor:
    """All-reduce a logged value, as a new tensor.

    Args:
        tensor: The value of this rank.
        axis_group: The process group.
        size: Number of its ranks.
        op: ``"mean"``, ``"avg"``, ``"sum"``, ``"max"``, ``"min"`` or ``"product"``.

    Returns:
        The reduced value; the mean of whole numbers is a float64, not rounded.

    Raises:
        UnsupportedError: For any other ``op``.

    """
    op = op.lower()
    average = op in ("mean", "avg")
    if not average and op not in _OPS:
        raise UnsupportedError(f"`reduce_op={op!r}` is not supported; choose one of mean, avg, {', '.join(_OPS)}.")
    if average and not tensor.is_floating_point() and not tensor.is_complex():
        tensor = tensor.to(torch.float64)
    # 16-bit values are added in 32 bit.
    wide = tensor.float() if tensor.is_floating_point() and tensor.element_size() == 2 else tensor.clone()
    if size > 1:
        wide = wide.contiguous()
        torch.distributed.all_reduce(wide, _OPS["sum" if average else op], group=axis_group)
    return (wide / size if average else wide).to(tensor.dtype)


_OPS = {
    "sum": torch.distributed.ReduceOp.SUM,
    "max": torch.distributed.ReduceOp.MAX,
    "min": torch.distributed.ReduceOp.MIN,
    "product": torch.distributed.ReduceOp.PRODUCT,
}
