"""Duplicate token dropping (DTD): tensor ranks hold the same tokens; each keeps only its share.

===========  ===========================  ===========================================================
function     forward                      gradient
===========  ===========================  ===========================================================
``drop``     this rank's slice of ``x``   ``[dx_0 .. dx_n]``, gathered from all ranks
``restore``  ``[x_0 .. x_n]``             this rank's slice of ``dx``, which is the same on all ranks
===========  ===========================  ===========================================================

Each is the gradient of the other (arXiv 2303.06318, section 5.1). A number of tokens that the axis does not divide is
shared out unevenly, the first ranks taking one more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_ted.collectives.phase import dual
from lightning_ted.collectives.primitives import all_gather_dim
from lightning_ted.mesh import Axis


def shares(length: int, parts: int) -> list[int]:
    """``length`` shared out over ``parts`` as evenly as can be: ``shares(7, 3) == [3, 2, 2]``."""
    return [(length + parts - 1 - index) // parts for index in range(parts)]


def share(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """This rank's slice of ``x`` along ``dim``, a view, without a gradient rule of its own."""
    sizes = shares(x.shape[dim], axis.size)
    return x.narrow(dim, sum(sizes[: axis.rank]), sizes[axis.rank])


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axis: Axis) -> Tensor:
        ctx.dim, ctx.axis, ctx.sizes = dim, axis, shares(x.shape[dim], axis.size)
        # A copy: an output that is a view of the input may not be changed in place.
        return share(x, dim, axis).clone(memory_format=torch.contiguous_format)

    @staticmethod
    @dual
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return all_gather_dim(grad, ctx.dim, ctx.sizes, ctx.axis), None, None


class _Restore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, length: int, axis: Axis) -> Tensor:
        ctx.dim, ctx.axis = dim, axis
        return all_gather_dim(x, dim, shares(length, axis.size), axis)

    @staticmethod
    @dual
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return share(grad, ctx.dim, ctx.axis), None, None, None


def drop(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """This rank's share of a replicated tensor along ``dim``."""
    return x if axis.size == 1 else _Drop.apply(x, dim, axis)


def restore(x: Tensor, length: int, axis: Axis, dim: int = 0) -> Tensor:
    """The replicated tensor of ``length`` along ``dim``, from every rank's share."""
    return x if axis.size == 1 else _Restore.apply(x, dim, length, axis)
