"""Waiting for updated weights no sooner than a forward reads them.

A module waits for its own weights, and for those of its children that have no children: a layer may use the weight of such a
child without calling it, as ``nn.MultiheadAttention`` does, and a head that is tied to an embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.nn import Parameter

from lightning_ted.optim.buckets import Bucket


def wait_in_forward(module: nn.Module, bucket_of: Mapping[Parameter, Bucket]) -> list[Any]:
    """Let each module of ``module`` wait for its weights before its forward; returns the handles of the hooks.

    Args:
        module: The module.
        bucket_of: Where weights may be on their way.

    """
    return [each.register_forward_pre_hook(partial(_wait, bucket_of)) for each in module.modules()]


def wait_for_own(module: nn.Module, bucket_of: Mapping[Parameter, Bucket]) -> None:
    """Wait for what ``module`` may read by itself."""
    for parameter in _read_by(module):
        if parameter in bucket_of:
            bucket_of[parameter].wait_for_weights()


def _wait(bucket_of: Mapping[Parameter, Bucket], module: nn.Module, args: Any) -> None:
    wait_for_own(module, bucket_of)


def _read_by(module: nn.Module) -> Iterator[Parameter]:
    yield from module.parameters(recurse=False)
    for child in module.children():
        if next(child.children(), None) is None:
            yield from child.parameters(recurse=False)
