"""An optimizer's state as one process would have it, from what each rank owns of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from lightning_ted.optim.sharded import ShardedOptimizer
from lightning_ted.optim.state import is_per_element

#: Makes a whole tensor of this rank's part of a parameter; None where it is not wanted. A collective.
Join = Callable[[Parameter, Tensor], "Tensor | None"]


def gather_state(optimizer: ShardedOptimizer, state: Mapping[str, Any], join: Join, keep: bool) -> dict[str, Any]:
    """``state``, as ``optimizer.state_dict()`` returned it, with whole tensors. A collective.

    Args:
        optimizer: The optimizer.
        state: What each rank owns, which is not changed.
        join: Makes whole tensors.
        keep: Whether this rank wants the result.

    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    entries_of = state["state"]
    owned_of = optimizer.sharded.owned_elements()
    known = _exchange(
        {
            index: _describe(entries_of[index], owned_of[parameter])
            for index, parameter in zip(indices, parameters, strict=True)
            if index in entries_of and parameter in owned_of
        }
    )
    # Some classes keep what belongs to no parameter.
    of_parameters = set(indices)
    result: dict[Any, Any] = {key: value for key, value in entries_of.items() if key not in of_parameters}
    for index, parameter in zip(indices, parameters, strict=True):
        if parameter not in owned_of:
            if index in entries_of:
                result[index] = entries_of[index]
            continue
        for key, (dtype, value) in known.get(index, {}).items():
            if dtype is not None:
                owned = entries_of.get(index, {}).get(key, torch.empty(0, dtype=dtype)).to(parameter.device)
                value = join(parameter, optimizer.sharded.gather(parameter, owned))
            if keep:
                result.setdefault(index, {})[key] = value
    return {**state, "state": result}


def _describe(entries: Mapping[str, Any], owned: int) -> dict[str, tuple[torch.dtype | None, Any]]:
    """Of each entry, the dtype if it has one for each of the ``owned`` elements, or itself if it is for all of them."""
    return {
        key: (value.dtype, None)
        if is_per_element(value, owned)
        else (None, value.cpu() if isinstance(value, Tensor) else value)
        for key, value in entries.items()
    }


def _exchange(own: dict[Any, Any]) -> dict[Any, Any]:
    """What any rank knows, in the same order on all of them."""
    if not dist.is_initialized():
        return own
    everybodys: list[dict[Any, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everybodys, own)
    return _merge(everybodys)


def _merge(parts: Iterable[dict[Any, Any]]) -> dict[Any, Any]:
    merged: dict[Any, Any] = {}
    for part in parts:
        for index, entries in part.items():
            merged.setdefault(index, entries)
    return merged
