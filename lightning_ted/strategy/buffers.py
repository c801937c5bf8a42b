"""Buffers that training changes, such as running statistics: each data-parallel rank has seen other samples.

They are made equal before an evaluation, not in every step: training reads the statistics of its own batch. Checkpoints
hold rank 0's, as they do under DDP.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_ted.collectives.primitives import all_extremes, broadcast_
from lightning_ted.layout import ParamLayout
from lightning_ted.mesh import Axis


@torch.no_grad()
def synchronize_buffers(
    module: nn.Module, layouts: Mapping[str, ParamLayout], data_axis: Axis, device: torch.device | None = None
) -> None:
    """Take over the whole buffers of data rank 0, in one broadcast; every rank calls it.

    Buffers that are not of one shape and dtype on all ranks, such as a cache of what a rank has seen, are left alone, and
    so are those that a rank does not have.

    Args:
        module: The module.
        layouts: Its layouts, by qualified name, in the same order on every rank; buffers that are cut or unknown are left
            alone.
        data_axis: The data axis.
        device: Where the ranks' buffers are compared; None for the CPU.

    """
    if data_axis.size == 1:
        return
    parameters = dict(module.named_parameters(remove_duplicate=False))
    # Not this rank's own buffers: others may have more of them, or fewer.
    names = [name for name, layout in layouts.items() if not layout.cuts and name not in parameters]
    if not names:
        return
    buffers = dict(module.named_buffers(remove_duplicate=False))
    kinds = torch.tensor([_kind(buffers.get(name)) for name in names], device=device)
    agree = torch.eq(*all_extremes(kinds, data_axis)).tolist()
    same = [buffers[name] for name, equal in zip(names, agree, strict=True) if equal and name in buffers]
    if not same:
        return
    # As bytes, so that one broadcast carries every dtype.
    parts = [_as_bytes(buffer) for buffer in same]
    packed = broadcast_(torch.cat(parts), data_axis)
    for buffer, part in zip(same, packed.split([part.numel() for part in parts]), strict=True):
        buffer.copy_(part.clone().view(buffer.dtype).view(buffer.shape))


def _kind(buffer: Tensor | None) -> int:
    """A number for a buffer's dtype and shape; 0 for none."""
    return 0 if buffer is None else 1 + zlib.crc32(f"{buffer.dtype} {tuple(buffer.shape)}".encode())


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)
