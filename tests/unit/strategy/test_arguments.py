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
