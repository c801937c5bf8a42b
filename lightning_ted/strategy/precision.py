"""Lightning's precision plugins, made to look at the gradient of the whole model.

A plugin is handed the optimizer only, and torch's ``clip_grad_norm_`` then sees this rank's shards: each tensor rank
would clip by another norm, and replicated weights would drift apart. So would the scales of a loss scaler that looks for
overflows in them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from lightning.pytorch.plugins.precision import (
    DoublePrecision,
    HalfPrecision,
    MixedPrecision,
    Precision,
    TransformerEnginePrecision,
)
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ted.errors import UnsupportedError
from lightning_ted.optim.sharded import share_of

#: Layers whose kernels want weights in 32 bits: in the dtype of running statistics, or of inputs that autocast leaves alone.
_WANT_WIDE_WEIGHTS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.Bilinear)


class ShardedPrecision(Precision):
    """Mixed into a precision plugin: clipping goes to the optimizer, which knows all of its gradient."""

    @override
    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        share_of(optimizer).clip_by_norm(float(clip_val))

    @override
    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: int | float) -> None:
        share_of(optimizer).clip_by_value(float(clip_val))


class ShardedScaler(GradScaler):
    """Mixed into a gradient scaler: one decision of the world whether there was an overflow, by the one norm."""

    @override
    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        share = share_of(optimizer)
        norm = share.grad_norm()
        share.scale_gradients(inv_scale)
        return {norm.device: (~norm.isfinite()).to(found_inf.dtype)}

    @override
    def _maybe_opt_step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        share = share_of(optimizer)
        before = share.steps
        result = super()._maybe_opt_step(optimizer, *args, **kwargs)
        if share.steps == before:
            share.skip()
        return result


def for_shards(plugin: Precision) -> Precision:
    """The same plugin object, for sharded optimizers.

    Raises:
        UnsupportedError: If the plugin computes in fp16 alone, or belongs to another strategy.

    """
    _refuse(plugin)
    # Objects change their classes, rather than being replaced, so that a user's own keep their state and are still those that
    # the user holds.
    if not isinstance(plugin, ShardedPrecision):
        plugin.__class__ = _mixed_into(type(plugin), ShardedPrecision)  # type: ignore[arg-type]
    scaler = getattr(plugin, "scaler", None)
    if isinstance(scaler, GradScaler) and not isinstance(scaler, ShardedScaler):
        scaler.__class__ = _mixed_into(type(scaler), ShardedScaler)  # type: ignore[arg-type]
    return plugin


def working_dtypes(plugin: Precision, module: nn.Module) -> dict[str, torch.dtype]:
    """The 16-bit dtype of the weights that the model computes with, by name, of those that have masters in 32 bits."""
    if not isinstance(plugin, MixedPrecision):
        return {}
    working = torch.float16 if plugin.precision == "16-mixed" else torch.bfloat16
    wide = [layer for layer in module.modules() if isinstance(layer, _WANT_WIDE_WEIGHTS)]
    kept = {parameter for layer in wide for parameter in layer.parameters(recurse=False)}
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    return {name: working for name, p in module.named_parameters() if p.dtype in kinds and p not in kept}


@cache
def _mixed_into(cls: type, mixin: type) -> Any:
    # Checkpoints file the plugin's state under its class's qualified name, which therefore stays that of the plain
    # plugin.
    names = {"__qualname__": cls.__qualname__, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(cls.__name__, (mixin, cls), names)


def _refuse(plugin: Precision) -> None:
    precision = getattr(plugin, "precision", "32-true")
    known = type(plugin) is Precision or isinstance(
        plugin, (ShardedPrecision, MixedPrecision, HalfPrecision, DoublePrecision)
    )
    if not known or isinstance(plugin, TransformerEnginePrecision):
        raise UnsupportedError(
            f"The precision plugin `{type(plugin).__name__}` cannot be used with `TEDStrategy`; choose "
            "`Trainer(precision=...)` among '32-true', 'bf16-mixed', '16-mixed', 'bf16-true' and '64-true'."
        )
    if precision == "16-true":
        raise UnsupportedError(
            "`Trainer(precision='16-true')` is not supported by `TEDStrategy`: without loss scaling and 32-bit masters, small "
            "gradients and updates are lost. Use `precision='16-mixed'` or 'bf16-true'."
        )
