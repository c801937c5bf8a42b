"""Stepping stand-ins: pieces of flat memory, by the class and the live settings of a user's own optimizer.

An optimizer's ``step`` loops over ``group["params"]``. For the time of one call these lists hold other tensors, so every
class and every setting works as it is, and whatever changes a group (a scheduler, a callback) is heard at once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

Update = Callable[[Optimizer], Any]


def plain_step(kind: type[Optimizer]) -> Update:
    """The ``step`` of a class without the hooks around it, which belong around a whole step and not around a tile."""
    hooked = getattr(kind.step, "hooked", False)
    return kind.step.__wrapped__ if hooked else kind.step  # type: ignore[attr-defined]


class StandInStepper:
    """Makes one step in several calls of ``update``, each of which sees only some stand-ins.

    Args:
        optimizer: The optimizer; its groups keep their dicts, so the settings are read live.
        update: Steps what the groups hold.

    """

    def __init__(self, optimizer: Optimizer, update: Update) -> None:
        self._optimizer = optimizer
        self._update = update
        # A class may count its steps in the group. Each call begins with the same count, so that all count as one step.
        self._settings = [_settings(group) for group in optimizer.param_groups]
        self._idle = set(range(len(self._settings)))

    def step(self, stand_ins: Mapping[int, list[Tensor]]) -> None:
        """One call, for the stand-ins of each group that has some."""
        self._idle.difference_update(stand_ins)
        groups = self._optimizer.param_groups
        used = [groups[index] for index in stand_ins]
        own = [group["params"] for group in used]
        try:
            for (index, tensors), group in zip(stand_ins.items(), used, strict=True):
                group.clear()
                group.update(params=tensors, **self._settings[index])
            self._optimizer.param_groups = used
            self._update(self._optimizer)
        finally:
            self._optimizer.param_groups = groups
            for group, params in zip(used, own, strict=True):
                group["params"] = params

    def finish(self) -> None:
        """Step the groups that had no stand-ins without any, so that what they count is the same on every rank."""
        if self._idle:
            self.step({index: [] for index in sorted(self._idle)})


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


@contextmanager
def without_hooks(optimizer: Optimizer) -> Iterator[None]:
    """A ``step`` that calls that of its base class would run the hooks of a whole step for each tile."""
    names = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    hooks = {name: getattr(optimizer, name) for name in names}
    for name in names:
        setattr(optimizer, name, OrderedDict())
    try:
        yield
    finally:
        for name, own in hooks.items():
            setattr(optimizer, name, own)
