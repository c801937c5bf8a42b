"""The collectives themselves, without gradients.

They are torch's functional collectives called as raw operators: the same on every torch from 2.10, and visible to
selective checkpointing, fake tensors and ``torch.compile``. A group of one rank communicates nothing and launches
nothing. In the recomputation of a region that has kept their outcome, the collectives of layers return it instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ted.collectives.tape import kept
from lightning_ted.mesh import Axis

_ops = torch.ops._c10d_functional


def _note(axis: Axis, kind: str, sent: int) -> None:
    # What is compiled runs without coming by here again.
    if axis.ledger.recorder is not None and not torch.compiler.is_compiling():
        axis.ledger.recorder.note(kind, axis.name, sent)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def signature(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    """What a forward and its recomputation have to hand to a collective alike."""
    return tensor.shape, tensor.dtype


def all_reduce(tensor: Tensor, axis: Axis, op: str = "sum") -> Tensor:
    """The reduction of every rank's ``tensor``, as a new tensor (the same one where the axis has one rank)."""
    if axis.size == 1:
        return tensor
    return kept("all_reduce", axis, signature(tensor), lambda: _all_reduce(tensor, axis, op))


def _all_reduce(tensor: Tensor, axis: Axis, op: str) -> Tensor:
    _note(axis, "all_reduce", 2 * _bytes(tensor) * (axis.size - 1) // axis.size)
    return _ops.wait_tensor(_ops.all_reduce(tensor.contiguous(), op, axis.group_name))


def all_reduce_(tensor: Tensor, axis: Axis, op: str = "sum") -> Tensor:
    """:func:`all_reduce` in place, for a contiguous tensor that nobody else reads."""
    return wait(start_all_reduce_(tensor, axis, op))


def start_all_reduce_(tensor: Tensor, axis: Axis, op: str = "sum") -> Tensor:
    """:func:`all_reduce_` that does not wait; call :func:`wait` on what it returns before reading it."""
    if axis.size == 1:
        return tensor
    _note(axis, "all_reduce", 2 * _bytes(tensor) * (axis.size - 1) // axis.size)
    return _ops.all_reduce_(tensor, op, axis.group_name)


def all_extremes(tensor: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """Elementwise, the largest and the smallest of every rank's ``tensor``, in one all-reduce.

    Where they are equal, all ranks agree, and all of them know it. The smallest number of an integer type has no negative
    and must not occur.
    """
    highest, negated = all_reduce(torch.stack([tensor, -tensor]), axis, "max").unbind()
    return highest, -negated


def wait(tensor: Tensor) -> Tensor:
    """Wait for a collective that was started on ``tensor``."""
    return _ops.wait_tensor(tensor)


def all_gather(tensor: Tensor, axis: Axis) -> Tensor:
    """Every rank's ``tensor`` (equal shapes), stacked: ``[...] -> [size, ...]``."""
    if axis.size == 1:
        return tensor.unsqueeze(0)
    return kept("all_gather", axis, signature(tensor), lambda: _all_gather(tensor, axis))


def _all_gather(tensor: Tensor, axis: Axis) -> Tensor:
    _note(axis, "all_gather", _bytes(tensor) * (axis.size - 1))
    # A scalar has no dimension to gather along.
    flat = tensor.reshape(1, *tensor.shape).contiguous()
    return _ops.wait_tensor(_ops.all_gather_into_tensor(flat, axis.size, axis.group_name))


def all_gather_rows(rows: Tensor, sizes: Sequence[int], axis: Axis) -> Tensor:
    """Every rank's rows, concatenated: ``[sizes[rank], ...] -> [sum(sizes), ...]``; the sizes may differ."""
    if axis.size == 1:
        return rows
    return kept("all_gather", axis, signature(rows), lambda: _all_gather_rows(rows, sizes, axis))


def _all_gather_rows(rows: Tensor, sizes: Sequence[int], axis: Axis) -> Tensor:
    if min(sizes) == max(sizes):
        _note(axis, "all_gather", _bytes(rows) * (axis.size - 1))
        return _ops.wait_tensor(_ops.all_gather_into_tensor(rows.contiguous(), axis.size, axis.group_name))
    # Exact sizes as an all-to-all in which everybody is sent the same rows: padding to the longest would send more, and
    # would have to be cut out again.
    _note(axis, "all_gather", _bytes(rows) * (axis.size - 1))
    copies = rows.expand(axis.size, *rows.shape).reshape(axis.size * rows.shape[0], *rows.shape[1:])
    return _exchange(copies, list(sizes), [rows.shape[0]] * axis.size, axis)


def reduce_scatter_rows(rows: Tensor, sizes: Sequence[int], axis: Axis) -> Tensor:
    """The sum over ranks of this rank's rows: ``[sum(sizes), ...] -> [sizes[rank], ...]``; the sizes may differ.

    Sent as an all-to-all and summed here in rank order: the same bytes as a reduce-scatter, exact sizes, and sums in
    the precision of the arithmetic rather than of the backend (gloo's own is an all-reduce inside and adds 16-bit in
    16-bit).
    """
    if axis.size == 1:
        return rows
    return kept("reduce_scatter", axis, signature(rows), lambda: _reduce_scatter_rows(rows, sizes, axis))


def _reduce_scatter_rows(rows: Tensor, sizes: Sequence[int], axis: Axis) -> Tensor:
    mine = sizes[axis.rank]
    _note(axis, "reduce_scatter", _bytes(rows) * (rows.shape[0] - mine) // max(rows.shape[0], 1))
    parts = _exchange(rows.contiguous(), [mine] * axis.size, list(sizes), axis).view(axis.size, mine, *rows.shape[1:])
    return _sum_parts(parts)


def start_reduce_scatter(flat: Tensor, sizes: Sequence[int], axis: Axis, divisor: int) -> Tensor:
    """The sum over ranks of this rank's share of ``flat`` (``[sum(sizes)]``) over ``divisor``, on its way.

    Neither ``flat`` nor what is returned may be touched before :func:`finish_reduce_scatter`. Sent as
    :func:`reduce_scatter_rows` is, but equal shares on devices whose backend has a reduce-scatter of its own.
    """
    mine = sizes[axis.rank]
    _note(axis, "reduce_scatter", (flat.numel() - mine) * flat.element_size())
    if not _by_backend(flat, sizes):
        return _ops.all_to_all_single(flat, [mine] * axis.size, list(sizes), axis.group_name)
    if flat.dtype == torch.float16:
        flat.div_(
            divisor
        )  # before, as the backend adds in 16 bits, where a sum may be too large that is none as a mean
    return _ops.reduce_scatter_tensor(flat, "sum", axis.size, axis.group_name)


def finish_reduce_scatter(pending: Tensor, out: Tensor, sizes: Sequence[int], axis: Axis, divisor: int) -> None:
    """Wait for what :func:`start_reduce_scatter` returned, and write the sum over ``divisor`` to ``out`` (``[sizes[rank]]``)."""
    received = wait(pending)
    if _by_backend(out, sizes):
        out.copy_(received)
        if divisor > 1 and out.dtype != torch.float16:
            out.div_(divisor)
        return
    parts = received.view(axis.size, out.numel())
    total = _sum_parts(parts, out) if parts.dtype.itemsize > 2 else parts.sum(0, dtype=torch.float32)
    if divisor > 1:
        total.div_(divisor)
    if total is not out:
        out.copy_(total)


def _by_backend(tensor: Tensor, sizes: Sequence[int]) -> bool:
    """Whether the backend reduce-scatters by itself: gloo's own is an all-reduce inside."""
    return tensor.is_cuda and min(sizes) == max(sizes)


def start_all_gather_(flat: Tensor, sizes: Sequence[int], axis: Axis) -> Tensor:
    """Fill in the other ranks' shares of ``flat`` (``[sum(sizes)]``); call :func:`wait` on what is returned."""
    shares = flat.split(list(sizes))
    if min(sizes) == max(sizes):
        _note(axis, "all_gather", _bytes(shares[axis.rank]) * (axis.size - 1))
        return _ops.all_gather_into_tensor_out(shares[axis.rank], axis.size, axis.group_name, out=flat)
    for rank, share in enumerate(shares):
        if share.numel():
            broadcast_(share, axis, rank)
    return flat


def _sum_parts(parts: Tensor, out: Tensor | None = None) -> Tensor:
    """``[size, ...] -> [...]``, in rank order, 16-bit numbers in 32 bits."""
    if parts.shape[0] == 2:
        return torch.add(parts[0], parts[1], out=out)
    if parts.dtype.itemsize > 2:
        return torch.sum(parts, 0, out=out)
    return parts.sum(0, dtype=torch.float32).to(parts.dtype)


def all_gather_dim(x: Tensor, dim: int, sizes: Sequence[int], axis: Axis) -> Tensor:
    """:func:`all_gather_rows` along any dimension."""
    return _move_back(all_gather_rows(x.movedim(dim, 0), sizes, axis), dim)


def reduce_scatter_dim(x: Tensor, dim: int, sizes: Sequence[int], axis: Axis) -> Tensor:
    """:func:`reduce_scatter_rows` along any dimension."""
    return _move_back(reduce_scatter_rows(x.movedim(dim, 0), sizes, axis), dim)


def _move_back(rows: Tensor, dim: int) -> Tensor:
    # Detached, so that autograd does not take a fresh tensor for a view, which may not be changed in place.
    return rows.movedim(0, dim).detach()


def all_to_all_rows(rows: Tensor, received: Sequence[int], sent: Sequence[int], axis: Axis) -> Tensor:
    """Rows exchanged by exact sizes: ``sent[i]`` rows go to rank ``i``, ``received[i]`` come from it."""
    if axis.size == 1:
        return rows
    return kept("all_to_all", axis, signature(rows), lambda: wait(start_all_to_all_rows(rows, received, sent, axis)))


def start_all_to_all_rows(rows: Tensor, received: Sequence[int], sent: Sequence[int], axis: Axis) -> Tensor:
    """:func:`all_to_all_rows`, over more than one rank, on its way: call :func:`wait` on it, and do not touch ``rows`` before."""
    total = sum(sent)
    _note(axis, "all_to_all", _bytes(rows) * (total - sent[axis.rank]) // max(total, 1))
    return _ops.all_to_all_single(rows.contiguous(), list(received), list(sent), axis.group_name)


def broadcast_(tensor: Tensor, axis: Axis, src: int = 0) -> Tensor:
    """Overwrite ``tensor`` (contiguous) with that of rank ``src`` of the axis."""
    if axis.size == 1:
        return tensor
    _note(axis, "broadcast", _bytes(tensor) if axis.rank == src else 0)
    dist.broadcast(tensor, group=axis.attached_group, group_src=src)
    return tensor


def _exchange(rows: Tensor, received: list[int], sent: list[int], axis: Axis) -> Tensor:
    return _ops.wait_tensor(_ops.all_to_all_single(rows, received, sent, axis.group_name))
