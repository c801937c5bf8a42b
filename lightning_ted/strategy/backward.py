"""When gradients are summed: after each backward pass, unless it is one of several that accumulate.

Note [Gradients that are summed already]
    Two backward passes may add into the same gradients without a step in between: accumulation by hand, or two losses
    of one ``training_step``. The second sum then runs over values that the first has summed. For a dense gradient that
    changes nothing (the mean of equal values); but a sum over the world divided by the data-parallel degree would
    multiply it by the tensor-parallel degree, and that of an expert by ``expert_data / data``. So before a pass adds to
    it, a summed gradient is divided by that factor, which the next sum restores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_ted.errors import UnsupportedError
from lightning_ted.layout import Family, ParamLayout
from lightning_ted.mesh import TEDMesh
from lightning_ted.optim.gradients import FAMILY_AXES, GradientReducer
from lightning_ted.strategy.partition import PartitionOptions

NamedParameters = list[tuple[str, Parameter]]


def make_backward_sync(mesh: TEDMesh, layouts: dict[str, ParamLayout], options: PartitionOptions) -> BackwardSync:
    """The :class:`BackwardSync` of a module that has been cut with ``options``."""
    top = mesh.topology
    # Undropped, every tensor rank sends all tokens: each reaches an expert once for every one that is no shard of it.
    dropped = options.duplicate_token_dropping or options.sequence_parallel
    duplicates = 1 if dropped else top.tensor // top.expert_tensor
    factors: dict[Family, float] = {family: top.size(axis) / top.data for family, axis in FAMILY_AXES.items()}
    factors["expert"] /= duplicates
    return BackwardSync(GradientReducer(mesh, layouts, duplicates), layouts, factors)


class BackwardSync:
    """Decides when to reduce, and keeps a second sum from counting the first one twice.

    Args:
        reducer: Sums and divides the gradients of the parameters that it is given, over the ranks of their families.
        layouts: The layout of every parameter, by qualified name.
        factors: What reducing does to a gradient of each family that is the same on every rank: number of ranks / divisor.

    """

    def __init__(
        self, reducer: GradientReducer, layouts: dict[str, ParamLayout], factors: Mapping[Family, float]
    ) -> None:
        self._reducer = reducer
        self._layouts = layouts
        self._factors = factors
        self._blocked = False
        self._summed: set[int] = set()

    @contextmanager
    def blocked(self) -> Iterator[None]:
        """Backward passes within the context accumulate locally."""
        before, self._blocked = self._blocked, True
        try:
            yield
        finally:
            self._blocked = before

    @torch.no_grad()
    def before_backward(self, parameters: NamedParameters) -> None:
        """To be called before a pass that adds to the gradients of ``parameters``."""
        for name, parameter in parameters:
            if id(parameter) not in self._summed:
                continue
            self._summed.discard(id(parameter))
            factor = self._factors[self._layouts[name].family]
            if parameter.grad is not None and factor != 1.0:
                parameter.grad.div_(factor)

    def require_summed(self, optimizer: Optimizer) -> None:
        """To be called before a step.

        Raises:
            UnsupportedError: If ``optimizer`` is about to step a gradient that did not come through here.

        """
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        foreign = sum(parameter.grad is not None and id(parameter) not in self._summed for parameter in parameters)
        if foreign:
            raise UnsupportedError(
                f"`{type(optimizer).__name__}` is about to step {foreign} parameters whose gradients have not been averaged over "
                "the ranks. In manual optimization, call `self.manual_backward(loss)`, not `loss.backward()`, and let the last "
                "pass before a step synchronise (`toggle_model(sync_grad=True)`)."
            )

    def after_backward(self, parameters: NamedParameters) -> None:
        """To be called after the pass, with the same ``parameters``: sums, unless blocked."""
        if self._blocked:
            return
        self._reducer.reduce(parameters)
        self._summed.update(id(parameter) for _, parameter in parameters)
