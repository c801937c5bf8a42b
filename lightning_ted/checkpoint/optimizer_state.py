"""An optimizer's state in model space: by the names of parameters, whole, whatever each rank owns of it.

Of each parameter, a state either has an entry for every element (a moment) or is one for all of them (a count of steps).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_ted.checkpoint.contents import TRAINING, Collector, Ranges
from lightning_ted.checkpoint.portions import Portion, Portions
from lightning_ted.checkpoint.reader import Tensors
from lightning_ted.checkpoint.tree import Names
from lightning_ted.errors import CheckpointError
from lightning_ted.optim.sharded import ShardedOptimizer
from lightning_ted.optim.state import is_per_element, segments_of

#: Makes a whole tensor of this rank's part of a parameter; None where it is not wanted. A collective.
Join = Callable[[Parameter, Tensor], "Tensor | None"]


# -- one file ---------------------------------------------------------------------------------------------------------------


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


def _exchange(own: dict[Any, Any], group: dist.ProcessGroup | None = None) -> dict[Any, Any]:
    """What any rank knows, in the same order on all of them."""
    if not dist.is_initialized():
        return own
    everybodys: list[dict[Any, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everybodys, own, group=group)
    return _merge(everybodys)


def _merge(parts: Iterable[dict[Any, Any]]) -> dict[Any, Any]:
    merged: dict[Any, Any] = {}
    for part in parts:
        for index, entries in part.items():
            merged.setdefault(index, entries)
    return merged


# -- a directory -----------------------------------------------------------------------------------------------------------


def tensor_name(index: int, name: str, key: str) -> str:
    """Under which name a state of the ``index``-th optimizer with an entry for every element of a parameter is written."""
    return f"{prefix_of(index)}{name}/{key}"


def prefix_of(index: int) -> str:
    """With what such names begin."""
    return f"optimizer/{index}/"


def collect_state(
    index: int,
    optimizer: Optimizer,
    state: Mapping[str, Any],
    names: Names,
    collector: Collector,
    group: dist.ProcessGroup | None,
) -> dict[str, Any]:
    """Collect the tensors of an optimizer's state; returns the rest as plain data. A collective over ``group``.

    Args:
        index: Which optimizer it is.
        optimizer: The optimizer.
        state: What the checkpoint holds of it: its groups are written as they are there.
        names: How parameters lie, and their names.
        collector: Takes the tensors.
        group: All ranks.

    """
    if not isinstance(optimizer, ShardedOptimizer):
        return dict(state)
    collector.expect(TRAINING)
    held = optimizer.sharded.optimizer.state
    segments = segments_of(optimizer.sharded.segments)
    of_all: dict[Any, Any] = {}
    for parameter, own in segments.items():
        filed = [held[segment.master] for segment in own if segment.master in held]
        if len(filed) < len(own):
            continue  # never stepped
        name, layout = names.known(parameter)
        axis = own[0].bucket.axis.name
        for key, value in filed[0].items():
            parts = [(segment, entries.get(key)) for segment, entries in zip(own, filed, strict=True)]
            if all(is_per_element(part, segment.size) for segment, part in parts):
                ranges = Ranges([(segment.piece.start, part.reshape(-1)) for segment, part in parts], axis, value.dtype)
                collector.add_ranges(TRAINING, tensor_name(index, name, key), ranges, layout)
            else:
                of_all.setdefault(name, {})[key] = _plain(value)
    masters = {segment.master for own in segments.values() for segment in own}
    for key, value in held.items():
        if not isinstance(key, Parameter):
            of_all[key] = _plain(value)  # belongs to no parameter
        elif key not in masters:
            # Of one that is not stepped at present, all ranks know the same.
            name, layout = names.known(key)
            for kind, entry in value.items():
                if is_per_element(entry, key.numel()):
                    collector.add(TRAINING, tensor_name(index, name, kind), entry.view(key.shape), layout)
                else:
                    of_all.setdefault(name, {})[kind] = _plain(entry)
    groups = [
        {**saved, "params": [names.known(parameter)[0] for parameter in live["params"]]}
        for saved, live in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    return {**state, "class": type(optimizer).__name__, "param_groups": groups, "state": _exchange(of_all, group)}


def _plain(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def restore_state(
    index: int,
    optimizer: Optimizer,
    saved: Mapping[str, Any],
    tensors: Tensors | None,
    names: Names,
    portions: Portions,
    group: dist.ProcessGroup | None,
) -> dict[str, Any]:
    """What an optimizer's ``load_state_dict`` is given: the state of this rank's elements. A collective over ``group``.

    Args:
        index: Which optimizer it is.
        optimizer: The optimizer.
        saved: What :func:`collect_state` returned when the checkpoint was written.
        tensors: What it collected.
        names: How parameters lie, and their names.
        portions: Says where this rank's parts lie.
        group: All ranks.

    Raises:
        CheckpointError: If it has another number of parameter groups, or a tensor is of another shape.

    """
    if not isinstance(optimizer, ShardedOptimizer) or "class" not in saved:
        return dict(saved)
    require_as_many_groups(saved, optimizer)
    parameters = [parameter for live in optimizer.param_groups for parameter in live["params"]]
    keys = _keys_of(index, tensors)
    wanted: dict[str, Portion] = {}
    state: dict[Any, Any] = {}
    segments = segments_of(optimizer.sharded.segments)
    shared = optimizer.sharded.owned_elements()
    for place, parameter in enumerate(parameters):
        name, layout = names.known(parameter)
        entries = dict(saved["state"].get(name, {}))
        for key in keys.get(name, ()) if tensors is not None else ():
            dtype = tensors.dtypes[tensor_name(index, name, key)]  # type: ignore[union-attr]
            if parameter in shared:
                own = segments.get(parameter, [])
                entries[key] = flat = torch.empty(shared[parameter], dtype=dtype)
                parts = flat.split([segment.size for segment in own])
                ranges = [(segment.piece.start, part) for segment, part in zip(own, parts, strict=True)]
                portion = portions.of_ranges(ranges, layout, dtype)
            else:
                entries[key] = torch.empty(layout.local_shape, dtype=dtype)
                portion = portions.of_part(entries[key], layout)
            wanted[tensor_name(index, name, key)] = portion
        if entries:
            state[place] = entries
    if tensors is not None:
        tensors.read(wanted, group)
    tell_of_differences(saved, [names.known(parameter)[0] for parameter in parameters])
    of_parameters = {name for group in saved["param_groups"] for name in group["params"]}
    # What belongs to no parameter, neither of now nor of then.
    state.update({key: value for key, value in saved["state"].items() if key not in of_parameters and key not in names})
    others = {key: value for key, value in saved.items() if key != "class"}
    return {**others, "state": state, "param_groups": numbered(saved["param_groups"], optimizer)}


def _keys_of(index: int, tensors: Tensors | None) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    prefix = prefix_of(index)
    for tensor in tensors.shapes if tensors is not None else ():
        if tensor.startswith(prefix):
            name, _, key = tensor.removeprefix(prefix).rpartition("/")
            found.setdefault(name, []).append(key)
    return found


def require_as_many_groups(saved: Mapping[str, Any], optimizer: Optimizer) -> None:
    """See that an optimizer has as many groups of parameters as the one whose state, by name, was ``saved``.

    Raises:
        CheckpointError: If not.

    """
    if len(saved["param_groups"]) != len(optimizer.param_groups):
        raise CheckpointError(
            f"The checkpoint's `{saved['class']}` has {len(saved['param_groups'])} parameter groups, that of "
            f"`configure_optimizers` {len(optimizer.param_groups)}. Make the same groups, or load the weights alone."
        )


def numbered(groups: Sequence[Mapping[str, Any]], optimizer: Optimizer) -> list[dict[str, Any]]:
    """Saved groups with the places, and torch's own names, of the parameters that the optimizer has now."""
    result, place = [], 0
    for saved, live in zip(groups, optimizer.param_groups, strict=True):
        of_now: dict[str, Any] = {"params": list(range(place, place + len(live["params"])))}
        if "param_names" in live:
            of_now["param_names"] = live["param_names"]
        result.append({**{key: value for key, value in saved.items() if key != "param_names"}, **of_now})
        place += len(live["params"])
    return result


def tell_of_differences(saved: Mapping[str, Any], names: Sequence[str]) -> None:
    """Warn if the state, by name, that was ``saved`` is of other parameters than these."""
    before = {name for group in saved["param_groups"] for name in group["params"]}
    for what, found in (("new", set(names) - before), ("gone", before - set(names))):
        if found:
            rank_zero_warn(
                f"The checkpoint's `{saved['class']}` steps other parameters: {len(found)} are {what}, such as '{min(found)}'. "
                "Their state begins anew or is left out."
            )
