"""Experts of a user's own block: one parameter each in a plain module, one for all of them where they are shared out.

Files of whole tensors have the names of the plain module, which so can read them; directories have those of the shared-out one.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

#: Under which key a checkpoint's information tells of them: as :func:`with_stacked` wants it.
INFO = "stacked_experts"

#: By the name of the module that holds them, the number of ``experts`` and the names of the ``parameters`` of each.
Stacked = Mapping[str, Mapping[str, Any]]


def with_stacked(stacked: Stacked, state: dict[str, Any]) -> dict[str, Any]:
    """A state dict with one tensor for all experts where it has one for each, and otherwise as it is."""
    result = copy.copy(state)  # keeps the class and its attributes: a state dict carries its version in one
    for name, singles in _names(stacked).items():
        if name not in result and all(single in result for single in singles):
            result[name] = torch.stack([result.pop(single) for single in singles])
    return result


def with_single(stacked: Stacked, state: dict[str, Any]) -> dict[str, Any]:
    """A state dict of whole tensors with one for each expert where it has one for all; they share its memory."""
    result = copy.copy(state)
    for name, singles in _names(stacked).items():
        whole = result.pop(name, None)
        if whole is not None:
            result |= dict(zip(singles, whole.unbind(), strict=True))
    return result


def _names(stacked: Stacked) -> dict[str, list[str]]:
    """Of each tensor for all experts, the names of those for each."""
    found: dict[str, list[str]] = {}
    for holder, told in stacked.items():
        prefix = f"{holder}." if holder else ""
        for path in told["parameters"]:
            found[f"{prefix}{path}"] = [f"{prefix}{number}.{path}" for number in range(told["experts"])]
    return found
