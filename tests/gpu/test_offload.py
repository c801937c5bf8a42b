"""Offloaded steps where the host's memory is not the device's: the same numbers, in pinned memory, and no state on the GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_ted.mesh import TEDMesh
from lightning_ted.topology import Topology
from tests.support.stepping import backward, gradients, make_parameters, make_training

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPES: list[tuple[int, ...]] = [(7,), (150,), (3, 71), (1,), (0,), (2, 5), (90, 2)]
OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {"lr": 0.01}),
    "AdamW one by one": (torch.optim.AdamW, {"lr": 0.01, "foreach": False}),
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.5}),
    "ASGD": (torch.optim.ASGD, {"lr": 0.1}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.01}),
}


def _on_gpu(shapes: list[tuple[int, ...]]) -> dict[str, Parameter]:
    return {
        name: Parameter(parameter.data.cuda()) for name, parameter in make_parameters(shapes, torch.float32).items()
    }


def _steps(name: str, tile_size: int | None, working: torch.dtype | None, offloads: bool) -> tuple[Optimizer, Any]:
    parameters = _on_gpu(SHAPES)
    kind, settings = OPTIMIZERS[name]
    optimizer = kind(parameters.values(), **settings)
    mesh = TEDMesh(Topology(1), "cuda")
    training = make_training(parameters, mesh, [optimizer], tile_size=tile_size, working=working, offload=offloads)
    for step in range(6):
        if step == 3:
            optimizer.load_state_dict(_moved(optimizer.state_dict()))
        optimizer.zero_grad()
        grads = {name: grad.cuda() for name, grad in gradients(parameters, step).items()}
        if step == 1:
            del grads["p2"]
        backward(training, parameters, grads)
        optimizer.step()
    masters = [optimizer.sharded.gather_master(parameter) for parameter in parameters.values()]
    training.release()
    return optimizer, [[p.detach() for p in parameters.values()], masters]


def _moved(state: dict[str, Any]) -> dict[str, Any]:
    """As a checkpoint is read: on the CPU."""
    entries = {
        index: {key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in own.items()}
        for index, own in state["state"].items()
    }
    return {**state, "state": entries}


@pytest.mark.parametrize("working", [None, torch.bfloat16])
@pytest.mark.parametrize("tile_size", [32, 100, None])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_offloaded_steps_are_bit_for_bit_the_others(
    name: str, tile_size: int | None, working: torch.dtype | None
) -> None:
    kept, tensors = _steps(name, tile_size, working, False)
    offloaded, others = _steps(name, tile_size, working, True)
    for ours, theirs in zip(others, tensors, strict=True):
        for pair in zip(ours, theirs, strict=True):
            assert pair[0] is pair[1] is None or (pair[0].is_cuda and torch.equal(*pair))
    ours, theirs = offloaded.state_dict()["state"], kept.state_dict()["state"]
    for index, entries in theirs.items():
        for key, value in entries.items():
            assert torch.equal(ours[index][key].cpu(), value.cpu())
    for segment in offloaded.sharded.segments:
        for key, value in offloaded.state[segment.master].items():
            if value.dim():
                assert value.device.type == "cpu" and value.is_pinned(), key


@pytest.mark.parametrize("working", [None, torch.bfloat16])
def test_the_gpu_never_holds_the_state(working: torch.dtype | None) -> None:
    """Of 64 MiB parameters, with 128 MiB of moments: what is there beside weights and gradients is some tiles."""
    elements, tile = 2**24, 2**18
    parameters = {"p": Parameter(torch.zeros(elements, device="cuda"))}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.01)
    training = make_training(
        parameters, TEDMesh(Topology(1), "cuda"), [optimizer], tile_size=tile, working=working, offload=True
    )
    for _ in range(3):
        with training.backward():
            (parameters["p"] * 2).sum().backward()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        # Three tiles of masters and two moments, the gradients of one, what a first step makes of state, and rounding.
        assert torch.cuda.max_memory_allocated() - before <= 20 * tile * 4
        assert torch.cuda.memory_allocated() - before <= 2**20
        optimizer.zero_grad()
