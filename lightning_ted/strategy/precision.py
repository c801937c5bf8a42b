"""Lightning's precision plugins, made to clip by the norm of the whole model.

A plugin is handed the optimizer only, and torch's ``clip_grad_norm_`` then sees this rank's shards: each tensor rank
would clip by another norm, and replicated weights would drift apart.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from lightning.pytorch.plugins.precision import (
    DoublePrecision,
    HalfPrecision,
    MixedPrecision,
    Precision,
    TransformerEnginePrecision,
)
from torch.nn import Parameter
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ted.errors import UnsupportedError

#: Clips the gradients of these parameters to a global norm, over all ranks.
NormClipper = Callable[[list[Parameter], float], None]


class ClipsGlobally(Precision):
    """Mixed into a precision plugin: clipping by norm goes through the strategy, which knows how parameters are cut.

    Clipping by value is elementwise, so the plugin's own is right.
    """

    norm_clipper: NormClipper

    @override
    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        # Also with no parameters on this rank: the norm is a collective.
        self.norm_clipper(list(self.main_params(optimizer)), float(clip_val))


def with_global_clipping(plugin: Precision, norm_clipper: NormClipper) -> Precision:
    """The same plugin object, clipping through ``norm_clipper``.

    Raises:
        UnsupportedError: If the plugin computes in fp16, or belongs to another strategy.

    """
    _refuse(plugin)
    if not isinstance(plugin, ClipsGlobally):
        # The object changes its class, rather than being replaced, so that a user's own plugin keeps its state and is
        # still the object that the user holds.
        plugin.__class__ = _clipping_class(type(plugin))  # type: ignore[arg-type]
    plugin.norm_clipper = norm_clipper  # type: ignore[attr-defined]
    return plugin


@cache
def _clipping_class(cls: type[Precision]) -> Any:
    # Checkpoints file the plugin's state under its class's qualified name, which therefore stays that of the plain
    # plugin.
    names = {"__qualname__": cls.__qualname__, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(cls.__name__, (ClipsGlobally, cls), names)


def _refuse(plugin: Precision) -> None:
    precision = getattr(plugin, "precision", "32-true")
    known = type(plugin) is Precision or isinstance(
        plugin, (ClipsGlobally, MixedPrecision, HalfPrecision, DoublePrecision)
    )
    if not known or isinstance(plugin, TransformerEnginePrecision):
        raise UnsupportedError(
            f"The precision plugin `{type(plugin).__name__}` cannot be used with `TEDStrategy`; choose "
            "`Trainer(precision=...)` among '32-true', 'bf16-mixed', 'bf16-true' and '64-true'."
        )
    if precision in ("16-mixed", "16-true"):
        raise UnsupportedError(
            f"`Trainer(precision='{precision}')` is not supported by `TEDStrategy`: an overflow on one rank's shard would "
            f"let the ranks' loss scales and weights drift apart. Use `precision='{precision.replace('16', 'bf16')}'`."
        )
