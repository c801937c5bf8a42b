"""Whether an optimizer steps each element by itself, so that stepping the parts of a parameter is stepping the parameter.

Found out by trying: an optimizer of the same class and settings steps a small matrix, another one its two halves, and the
results are compared. Names would tell only of optimizers that are known here.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

_SHAPE, _STEPS = (4, 6), 3


def is_elementwise(optimizer: Optimizer) -> bool | None:
    """Try ``optimizer``'s class with its settings, on the CPU, without touching its parameters or the random state.

    Returns:
        Whether whole and halves are stepped alike; None if the class cannot be tried: it takes other arguments than its
        settings, wants a closure, or fails on a small matrix.

    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(_SHAPE, generator=generator)
    # Gradients of several sizes: one that is large makes a norm that limits updates count.
    grads = [10.0 ** (2 * step - 2) * torch.randn(_SHAPE, generator=generator) for step in range(_STEPS)]
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        try:
            whole = torch.cat(_stepped(optimizer, [start], [[grad] for grad in grads]))
            for dim in (0, 1):
                halves = _stepped(optimizer, start.chunk(2, dim), [grad.chunk(2, dim) for grad in grads])
                if not torch.allclose(torch.cat(halves, dim), whole, rtol=1e-5, atol=1e-7):
                    return False
                # Each half on a rank of its own, where it does not see the other one.
                alone = [
                    _stepped(optimizer, [half], [[grad.chunk(2, dim)[index]] for grad in grads])[0]
                    for index, half in enumerate(start.chunk(2, dim))
                ]
                if not torch.allclose(torch.cat(alone, dim), whole, rtol=1e-5, atol=1e-7):
                    return False
        except Exception:  # whatever a foreign class raises, it cannot be tried
            return None
    return True


def _stepped(optimizer: Optimizer, tensors: Any, grads: Any) -> list[Tensor]:
    """``tensors`` after one step with each of ``grads``, by a new optimizer."""
    parameters = [Parameter(tensor.clone()) for tensor in tensors]
    twin = type(optimizer)(parameters, **_settings(optimizer))
    for step in grads:
        for parameter, grad in zip(parameters, step, strict=True):
            parameter.grad = grad.clone()
        twin.step()
    return [parameter.detach() for parameter in parameters]


def _settings(optimizer: Optimizer) -> dict[str, Any]:
    """The settings of the first group, as arguments of the class."""
    group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    accepted = inspect.signature(type(optimizer)).parameters
    anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in accepted.values())
    # Devices' own implementations are the same arithmetic, and want tensors of that device.
    own = {"fused": None, "foreach": None, "capturable": False}
    chosen = {**group, **{key: value for key, value in own.items() if key in group}}
    return {
        key: value.detach().cpu().clone() if isinstance(value, Tensor) else value
        for key, value in chosen.items()
        if anything or key in accepted
    }
