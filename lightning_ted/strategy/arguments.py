"""Of which kinds the constructor's arguments are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from torch import nn

from lightning_ted.adapters import MoESpec
from lightning_ted.collectives.tape import KEEP_POLICIES
from lightning_ted.errors import UnsupportedError
from lightning_ted.moe.dispatch import dispatchers


def _one_of(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: value is None or isinstance(value, kinds)


def _is_plan(value: Any) -> bool:
    entries = value.items() if isinstance(value, Mapping) else ()
    return value == "auto" or (
        isinstance(value, Mapping) and all(isinstance(k, str) and isinstance(v, str) for k, v in entries)
    )


def _are_classes(value: Any) -> bool:
    if not isinstance(value, (list, tuple, set, frozenset)):
        return value is None or isinstance(value, str)
    return len(value) > 0 and all(
        isinstance(v, str) or (isinstance(v, type) and issubclass(v, nn.Module)) for v in value
    )


def _is_backend(value: Any) -> bool:
    known = dist.Backend.backend_list
    return value is None or (
        isinstance(value, str) and all(part.split(":")[-1].lower() in known for part in value.split(","))
    )


_LEFT_TO_THE_TRAINER = "; it is usually left to the Trainer"
#: What the constructor's other arguments than sizes may be.
_ARGUMENTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "sequence_parallel": (lambda value: isinstance(value, bool), "True or False"),
    "duplicate_token_dropping": (lambda value: isinstance(value, bool), "True or False"),
    "activation_checkpointing": (
        lambda value: value in (None, "full", "comm_aware"),
        "None, 'full' or 'comm_aware'",
    ),
    "activation_checkpointing_policy": (
        _are_classes,
        "None, the name of a module class, or a list of classes or their names",
    ),
    "comm_aware_policy": (lambda value: value in KEEP_POLICIES, f"one of {', '.join(map(repr, KEEP_POLICIES))}"),
    "moe_overlap_chunks": (
        lambda value: type(value) is int and value > 0,
        "a positive number of chunks (1 sends all tokens at once)",
    ),
    "moe_dispatcher": (
        lambda value: value in dispatchers(),
        f"one of {', '.join(map(repr, dispatchers()))}, or a name given to `register_dispatcher`",
    ),
    "moe_specs": (
        lambda value: value is None or (isinstance(value, list) and all(isinstance(v, MoESpec) for v in value)),
        "a list of `MoESpec` or None",
    ),
    "record_communication": (lambda value: isinstance(value, bool), "True or False"),
    "zero_stage": (
        lambda value: type(value) is int and value in (1, 2),
        "1 or 2 (3, which would share out the weights, too, is not there yet)",
    ),
    "optimizer_tile_size": (
        lambda value: value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0),
        "a positive number of elements or None",
    ),
    "offload_optimizer": (lambda value: isinstance(value, bool), "True or False"),
    "overlap_weight_gather": (lambda value: isinstance(value, bool), "True or False"),
    "fp32_gradients": (lambda value: isinstance(value, bool), "True or False"),
    "save_distributed_checkpoint": (lambda value: isinstance(value, bool), "True or False"),
    "async_save": (lambda value: isinstance(value, bool), "True or False"),
    "exclude_frozen_parameters": (lambda value: isinstance(value, bool), "True or False"),
    "tensor_parallel_plan": (_is_plan, "'auto' or a dict of name pattern to style"),
    "accelerator": (_one_of(Accelerator), f"an Accelerator or None{_LEFT_TO_THE_TRAINER}"),
    "parallel_devices": (
        lambda value: value is None or (isinstance(value, list) and all(isinstance(v, torch.device) for v in value)),
        f"a list of torch.device or None{_LEFT_TO_THE_TRAINER}",
    ),
    "cluster_environment": (_one_of(ClusterEnvironment), f"a ClusterEnvironment or None{_LEFT_TO_THE_TRAINER}"),
    "checkpoint_io": (_one_of(CheckpointIO), "a CheckpointIO or None"),
    "precision_plugin": (_one_of(Precision), f"a Precision plugin or None{_LEFT_TO_THE_TRAINER}"),
    "process_group_backend": (_is_backend, "a backend of torch.distributed or None"),
    "timeout": (
        lambda value: value is None or (isinstance(value, timedelta) and value > timedelta(0)),
        "a timedelta longer than zero or None",
    ),
}


#: Those that say with what a strategy runs, not how a module is laid out.
OF_THE_TRAINER = {
    "accelerator",
    "parallel_devices",
    "cluster_environment",
    "checkpoint_io",
    "precision_plugin",
    "process_group_backend",
}


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """See that the constructor's arguments are of their kinds and go together; sizes are checked with the world that they divide.

    Raises:
        UnsupportedError: Naming the first that is or does not.

    """
    for name, (fits, what) in _ARGUMENTS.items():
        if not fits(arguments[name]):
            raise UnsupportedError(f"`{name}={arguments[name]!r}` must be {what}.")
    if arguments["sequence_parallel"] and not arguments["duplicate_token_dropping"]:
        raise UnsupportedError(
            "`sequence_parallel=True` splits the tokens before the experts, which leaves no duplicates to keep: "
            "`duplicate_token_dropping=False` cannot be had with it. Leave one of the two at its default."
        )
    if arguments["async_save"] and not arguments["save_distributed_checkpoint"]:
        raise UnsupportedError(
            "`async_save=True` writes directories, and `save_distributed_checkpoint=False` asks for files; leave one of the two at "
            "its default."
        )
    if arguments["checkpoint_io"] is not None and arguments["save_distributed_checkpoint"]:
        raise UnsupportedError(
            f"`checkpoint_io={arguments['checkpoint_io']!r}` writes files, and `save_distributed_checkpoint=True` directories; set "
            "that to False."
        )
    mode = arguments["activation_checkpointing"]
    _refuse_idle(arguments, "activation_checkpointing_policy", None, "full", idle=mode is None)
    _refuse_idle(arguments, "comm_aware_policy", "all", "comm_aware", idle=mode != "comm_aware")


def _refuse_idle(arguments: Mapping[str, Any], name: str, default: Any, wanted: str, idle: bool) -> None:
    if idle and arguments[name] != default:
        raise UnsupportedError(
            f"`{name}={arguments[name]!r}` has no effect with "
            f"`activation_checkpointing={arguments['activation_checkpointing']!r}`; set that to {wanted!r}, or leave `{name}` out."
        )
