"""An optimizer's state of whole tensors: by number, as torch and one-file checkpoints have it, and by name, as directories do.

Numbers say nothing of the model. So a file of this package tells which parameter each of them is, and one of another strategy
does if the optimizer was made of ``named_parameters()``.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_ted.checkpoint.optimizer_state import (
    numbered,
    prefix_of,
    require_as_many_groups,
    tell_of_differences,
    tensor_name,
)
from lightning_ted.optim.state import is_per_element


def numbers_of(state: Mapping[str, Any]) -> list[Any]:
    """The numbers of an optimizer's parameters, in order."""
    return [number for group in state.get("param_groups", ()) for number in group["params"]]


def own_names(state: Mapping[str, Any], known: Container[str]) -> list[str] | None:
    """The names that torch has kept of an optimizer's parameters, in order; None if it was given none, or others than ``known``."""
    names = [name for group in state.get("param_groups", ()) for name in group.get("param_names", ())]
    return names if all(name in known for name in names) else None


def by_name(
    index: int,
    kind: str,
    state: Mapping[str, Any],
    names: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    tensors: dict[str, Tensor],
) -> dict[str, Any]:
    """An optimizer's state as a directory has it.

    Args:
        index: Which optimizer it is.
        kind: Its class.
        state: The state by number.
        names: Of its parameters, in order.
        shapes: Of the model's tensors.
        tensors: Takes those that have an entry for each element of a parameter.

    """
    name_of = dict(zip(numbers_of(state), names, strict=True))
    of_all: dict[Any, Any] = {}
    for number, entries in state["state"].items():
        if number not in name_of:
            of_all[number] = entries  # belongs to no parameter
            continue
        name = name_of[number]
        elements = _elements(shapes.get(name), entries)
        for key, value in entries.items():
            if is_per_element(value, elements):
                tensors[tensor_name(index, name, key)] = value.reshape(shapes.get(name, value.shape))
            else:
                of_all.setdefault(name, {})[key] = value
    groups = [{**group, "params": [name_of[number] for number in group["params"]]} for group in state["param_groups"]]
    return {**state, "class": kind, "param_groups": groups, "state": of_all}


def _elements(shape: tuple[int, ...] | None, entries: Mapping[str, Any]) -> int:
    """How many elements a parameter has; one that is not in the model's state dict has those of its largest state."""
    if shape is not None:
        return math.prod(shape)
    return max((value.numel() for value in entries.values() if isinstance(value, Tensor)), default=0)


def names_of(saved: Mapping[str, Any]) -> list[str]:
    """The names of an optimizer's parameters in a directory, in order."""
    return [name for group in saved["param_groups"] for name in group["params"]]


def by_number(index: int, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """An optimizer's state as torch has it; what :func:`by_name` does, undone.

    Args:
        index: Which optimizer it is.
        saved: The state by name.
        tensors: Those of all optimizers that have an entry for each element of a parameter.

    """
    names = names_of(saved)
    number_of = {name: number for number, name in enumerate(names)}
    state: dict[Any, Any] = {}
    for name, entries in saved["state"].items():
        state[number_of.get(name, name)] = entries
    for full, tensor in tensors.items():
        prefix, _, key = full.rpartition("/")
        name = prefix.removeprefix(prefix_of(index))
        if name != prefix and name in number_of:
            state[number_of[name]] = {**state.get(number_of[name], {}), key: tensor}
    groups = [{**group, "params": [number_of[name] for name in group["params"]]} for group in saved["param_groups"]]
    others = {key: value for key, value in saved.items() if key != "class"}
    # In the order of parameters, as torch has them.
    return {**others, "state": dict(sorted(state.items(), key=lambda item: _order(item[0]))), "param_groups": groups}


def renumbered(
    kind: str, state: Mapping[str, Any], before: Sequence[str], optimizer: Optimizer, now: Sequence[str]
) -> dict[str, Any]:
    """An optimizer's state by number, as it is for one whose parameters have other numbers.

    Args:
        kind: The class of the optimizer that had it.
        state: The state.
        before: The names of its parameters, in order.
        optimizer: The one that is to have it.
        now: The names of the parameters of that.

    Raises:
        CheckpointError: If it has another number of parameter groups.

    """
    name_of = dict(zip(numbers_of(state), before, strict=True))
    number_of = {name: number for number, name in enumerate(now)}
    groups = [{**group, "params": [name_of[number] for number in group["params"]]} for group in state["param_groups"]]
    saved = {"class": kind, "param_groups": groups}
    require_as_many_groups(saved, optimizer)
    tell_of_differences(saved, now)
    entries = {
        number_of.get(name_of[number], number) if number in name_of else number: value
        for number, value in state["state"].items()
        if number not in name_of or name_of[number] in number_of
    }
    return {**state, "state": entries, "param_groups": numbered(state["param_groups"], optimizer)}


def _order(key: Any) -> float:
    return key if isinstance(key, int) else math.inf
