"""The activations of an expert, and their gradients written out: a backward can then make the activation again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ActivationName = Literal["swiglu", "gelu", "relu"]


class Activation(NamedTuple):
    """A function of the hidden features ``[N, H]``, without autograd.

    Attributes:
        value: ``[N, H]`` to ``[N, F]``.
        gradient: The gradient of the value ``[N, F]`` and the input ``[N, H]`` to the gradient of the input.
        widening: ``H / F``.

    """

    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]
    widening: int = 1


def _swiglu(hidden: Tensor) -> Tensor:
    gate, up = hidden.chunk(2, -1)
    return F.silu(gate).mul_(up)


def _swiglu_gradient(grad: Tensor, hidden: Tensor) -> Tensor:
    gate, up = hidden.chunk(2, -1)
    # Everything is written where it belongs: no temporaries, and no concatenation of the halves.
    grads = torch.empty_like(hidden)
    grad_gate, grad_up = grads.chunk(2, -1)
    torch.ops.aten.silu.out(gate, out=grad_up)
    grad_up.mul_(grad)
    torch.mul(grad, up, out=grad_gate)
    torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
    return grads


ACTIVATIONS: dict[str, Activation] = {
    #: ``silu(gate) * up`` of the two halves of the hidden features (arXiv 2002.05202).
    "swiglu": Activation(_swiglu, _swiglu_gradient, widening=2),
    "gelu": Activation(F.gelu, torch.ops.aten.gelu_backward),
    "relu": Activation(F.relu, lambda grad, hidden: torch.ops.aten.threshold_backward(grad, hidden, 0)),
}


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.activation = activation
        return activation.value(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.activation.gradient(grad, *ctx.saved_tensors), None


def swiglu(hidden: Tensor) -> Tensor:
    """``silu(gate) * up`` of the halves of the last dimension, ``[..., 2F] -> [..., F]``; keeps its input only."""
    return activate(hidden, ACTIVATIONS["swiglu"])


def activate(hidden: Tensor, activation: Activation) -> Tensor:
    """The activation with its gradient; keeps its input only."""
    return _Activate.apply(hidden, activation)
