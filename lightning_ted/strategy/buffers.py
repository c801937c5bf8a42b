"""Buffers that training changes, such as running statistics: each data-parallel rank has seen other samples.

They are made equal before an evaluation, not in every step: training reads the statistics of its own batch. Checkpoints
hold rank 0's, as they do under DDP.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_ted.collectives.primitives import all_reduce, broadcast_
from lightning_ted.layout import ParamLayout
from lightning_ted.mesh import Axis


@torch.no_grad()
def synchronize_buffers(module: nn.Module, layouts: Mapping[str, ParamLayout], data_axis: Axis) -> None:
    """Take over the whole buffers of data rank 0, in one broadcast; every rank calls it.

    Buffers whose size differs between ranks, such as a cache of what a rank has seen, are left alone.

    Args:
        module: The module.
        layouts: Its layouts, by qualified name; buffers that are cut or unknown are left alone.
        data_axis: The data axis.

    """
    if data_axis.size == 1:
        return
    buffers = [buffer for name, buffer in module.named_buffers() if name in layouts and not layouts[name].cuts]
    if not buffers:
        return
    sizes = torch.tensor([buffer.numel() * buffer.element_size() for buffer in buffers], device=buffers[0].device)
    largest, smallest = all_reduce(torch.stack([sizes, -sizes]), data_axis, "max").tolist()
    same = [b for b, high, low in zip(buffers, largest, smallest, strict=True) if high == -low]
    # As bytes, so that one broadcast carries every dtype.
    packed = broadcast_(torch.cat([_as_bytes(buffer) for buffer in same]), data_axis)
    for buffer, part in zip(same, packed.split([_as_bytes(buffer).numel() for buffer in same]), strict=True):
        buffer.copy_(part.clone().view(buffer.dtype).view(buffer.shape))


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)
