from datetime import timedelta

import pytest
import torch

from lightning_ted import TEDStrategy
from lightning_ted.errors import TEDError


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("sequence_parallel", "no"),
        ("duplicate_token_dropping", 2),
        ("activation_checkpointing", "some"),
        ("activation_checkpointing", True),
        ("activation_checkpointing_policy", 3),
        ("activation_checkpointing_policy", []),
        ("activation_checkpointing_policy", [3]),
        ("activation_checkpointing_policy", [int]),
        ("comm_aware_policy", "none"),
        ("comm_aware_policy", None),
        ("moe_overlap_chunks", 0),
        ("moe_overlap_chunks", 1.5),
        ("moe_overlap_chunks", True),
        ("moe_dispatcher", "deepep"),
        ("moe_dispatcher", ["all_to_all"]),
        ("record_communication", 1),
        ("exclude_frozen_parameters", None),
        ("tensor_parallel_plan", None),
        ("tensor_parallel_plan", "bogus"),
        ("tensor_parallel_plan", ["a"]),
        ("tensor_parallel_plan", {3: "colwise"}),
        ("accelerator", "cpu"),
        ("parallel_devices", ["a"]),
        ("cluster_environment", "slurm"),
        ("checkpoint_io", "x"),
        ("precision_plugin", "bf16"),
        ("process_group_backend", "foo"),
        ("timeout", 5),
        ("timeout", timedelta(0)),
    ],
)
def test_arguments_of_the_wrong_kind_are_refused_by_name(argument: str, value: object) -> None:
    with pytest.raises(TEDError, match=f"^`{argument}=.*` must be "):
        TEDStrategy(**{argument: value})  # type: ignore[arg-type]


def test_arguments_of_the_right_kind_are_taken() -> None:
    TEDStrategy(
        parallel_devices=[torch.device("cpu")], process_group_backend="cpu:gloo,cuda:nccl", timeout=timedelta(seconds=5)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"activation_checkpointing_policy": ["Block"]},
            "`activation_checkpointing_policy=.*None`; set that to 'full'",
        ),
        (
            {"comm_aware_policy": "default"},
            "`comm_aware_policy='default'` has no effect .*None`; set that to 'comm_aware'",
        ),
        ({"comm_aware_policy": "default", "activation_checkpointing": "full"}, "'full'`; set that to 'comm_aware'"),
    ],
)
def test_arguments_that_would_do_nothing_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(TEDError, match=message):
        TEDStrategy(**arguments)  # type: ignore[arg-type]
