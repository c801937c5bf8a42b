"""Collectives counted where torch dispatches them, whoever asks for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode

#: What an operation's name has to contain, in order, and its kind.
_KINDS = (
    (("reduce_scatter",), "reduce_scatter"),
    (("all_gather", "allgather"), "all_gather"),
    (("all_reduce", "allreduce"), "all_reduce"),
    (("all_to_all", "alltoall"), "all_to_all"),
    (("broadcast",), "broadcast"),
)


class CollectiveBytes(TorchDispatchMode):
    """Bytes that this rank sends within the context, by kind, by the ring algorithms' counts.

    Attributes:
        sent: Bytes by kind.

    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = _kind_of(func)
        if kind is not None:
            self.sent[kind] += _sent(kind, func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _kind_of(func: Any) -> str | None:
    if func.namespace not in ("c10d", "_c10d_functional"):
        return None
    name = func._schema.name
    return next((kind for parts, kind in _KINDS if any(part in name for part in parts)), None)


def _sent(kind: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    group = _group_of(given)
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    if size == 1:
        return 0
    inputs = [tensor for key, value in given.items() if not key.startswith("out") for tensor in _tensors(value)]
    held = sum(tensor.nbytes for tensor in inputs)
    if kind == "all_to_all":
        if len(inputs) > 1:
            return held - inputs[rank].nbytes
        splits, rows = given.get("input_split_sizes") or (), inputs[0].shape[0]
        own = splits[rank] if splits else rows // size
        return held * (rows - own) // rows if rows else 0
    if kind == "all_gather":
        return held * (size - 1)
    factor = {"all_reduce": 2, "reduce_scatter": 1, "broadcast": 1}[kind]
    return factor * held * (size - 1) // size


def _group_of(given: dict[str, Any]) -> dist.ProcessGroup:
    for value in given.values():
        if isinstance(value, torch.ScriptObject):
            return dist.ProcessGroup.unbox(value)
        if isinstance(value, dist.ProcessGroup):
            return value
    return _resolve_process_group(given["group_name"])


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
