"""The user's optimizer, made to step this rank's share: tile by tile, by its own class and settings.

Note [The object stays]
    The optimizer changes its class, rather than being wrapped, so that schedulers, callbacks and the user hold the object
    that steps, under its name and with its ``param_groups``. What is added hangs on one attribute: Lightning hands out
    proxies on which attributes that a method sets would stay behind.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ted.errors import UnsupportedError
from lightning_ted.optim.stand_ins import plain_step
from lightning_ted.optim.state import load_pieces, owned_state
from lightning_ted.optim.step import ShardedStep


class ShardedOptimizer(Optimizer):
    """Mixed into an optimizer's class.

    Attributes:
        sharded: This rank's share, and the step over it.
        plain_class: What the optimizer was before.

    """

    sharded: ShardedStep
    plain_class: type[Optimizer]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget this optimizer's gradients, those of this rank's share too."""
        super().zero_grad(set_to_none)
        self.sharded.forget_gradients(set_to_none)

    @override
    def state_dict(self) -> dict[str, Any]:
        """As torch's; of each tensor that is shared out, the elements that this rank owns, ``[owned]``."""
        optimizer = self.sharded.optimizer  # not the proxy that this may be called on
        whole = optimizer.state
        try:
            optimizer.state = owned_state(whole, self.sharded.segments)
            return super().state_dict()
        finally:
            optimizer.state = whole

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state.

        Args:
            state_dict: As torch's, with tensors of the (local) parameters' shapes or of this rank's elements.

        """
        super().load_state_dict({**state_dict, "state": {}})
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        state = {
            parameter: state_dict["state"][index]
            for index, parameter in zip(indices, parameters, strict=True)
            if index in state_dict["state"]
        }
        self.state.clear()
        # What belongs to no parameter is kept as it is, as torch does.
        of_parameters = set(indices)
        self.state.update((key, value) for key, value in state_dict["state"].items() if key not in of_parameters)
        shared = set(self.sharded.parameters)
        load_pieces(self.state, state, self.sharded.segments, shared, self.sharded.counted_on_device())


def shard_optimizer(optimizer: Optimizer, step: ShardedStep) -> None:
    """Let ``optimizer`` step this rank's share only, by ``step``, which was made for it."""
    # A scheduler that was made before has put its own wrapper of the plain step here.
    optimizer.__dict__.pop("step", None)
    optimizer.__class__ = _sharded_class(type(optimizer))  # type: ignore[arg-type]
    # The share is scaled by itself: a gradient scaler is to treat this optimizer as an ordinary one.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    optimizer.sharded = step  # type: ignore[attr-defined]


def groups_of(optimizer: ShardedOptimizer) -> dict[str, Any]:
    """An optimizer's ``state_dict``, of which the state is left out."""
    whole = optimizer.state
    try:
        optimizer.state = defaultdict(dict)
        # As the optimizer's own class does it, which may add entries of its own.
        return super(ShardedOptimizer, optimizer).state_dict()
    finally:
        optimizer.state = whole


def share_of(optimizer: Optimizer) -> ShardedStep:
    """This rank's share of an optimizer, or of one that a proxy stands for.

    Raises:
        UnsupportedError: If it has not been sharded.

    """
    share = getattr(optimizer, "sharded", None)
    if share is None:
        raise UnsupportedError(
            f"This `{type(optimizer).__name__}` is not one of those that `configure_optimizers` returned, so its gradients are not "
            "averaged over the ranks and cannot be clipped, unscaled or measured."
        )
    return share


def unshard_optimizer(optimizer: Optimizer) -> None:
    """Give an optimizer its class back, if it was sharded in an earlier run; its state is that of the elements that this rank
    stepped, by parameter."""
    if isinstance(optimizer, ShardedOptimizer):
        optimizer.state = owned_state(optimizer.state, optimizer.sharded.segments)
        optimizer.__class__ = optimizer.plain_class  # type: ignore[assignment]
        del optimizer.sharded


@cache
def _sharded_class(kind: type[Optimizer]) -> Any:
    update = plain_step(kind)

    def step(self: ShardedOptimizer, closure: Callable[[], Any] | None = None) -> Any:
        self._opt_called = True  # type: ignore[attr-defined]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.sharded.step(update)
        return loss

    hooked = Optimizer.profile_hook_step(step)
    hooked.hooked = True  # type: ignore[attr-defined]
    # Tells a scheduler that steps are noted already, in the attribute that it looks at.
    hooked._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    own = {
        "__qualname__": kind.__qualname__,
        "__module__": kind.__module__,
        "__doc__": kind.__doc__,
        "step": hooked,
        "plain_class": kind,
    }
    return type(kind.__name__, (ShardedOptimizer, kind), own)
