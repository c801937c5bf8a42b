"""One rank's slice of a model's parameters, stepped by lightning_ted or by torch alone, and what a step of it costs.

The slice is as under ``bf16-mixed``: bf16 working weights and gradients, fp32 masters and moments, AdamW.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from benchmarks.step import cpu_seconds, status_bytes
from lightning_ted.layout import ParamLayout
from lightning_ted.mesh import TEDMesh
from lightning_ted.optim.options import TrainingOptions
from lightning_ted.optim.step import ShardedStep
from lightning_ted.strategy.partition import PartitionOptions
from lightning_ted.strategy.training import Training
from lightning_ted.topology import Topology

WARMUP = 2
SETTINGS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
#: Implementations of torch's own step.
TORCH: dict[str, dict[str, bool]] = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "for-loop": {"fused": False, "foreach": False},
}
#: Bytes for each parameter that no step can do without: the gradient read, masters and two moments read and written, the
#: working weight written.
NEEDED_TRAFFIC = 2 + 3 * 8 + 2
#: Those, and the gradient's fp32 copy written and read, and the masters read again to be rounded.
MOVED_TRAFFIC = NEEDED_TRAFFIC + 8 + 4
#: Bytes for each parameter that offload moves over the bus: masters and two moments, there and back.
OFFLOAD_TRAFFIC = 3 * 8


def slice_sizes(total: int) -> list[int]:
    """Sizes of a slice's parameters: one of two fifths of it, and matrices and vectors of odd sizes."""
    large, layers = 2 * total // 5, 12
    matrix, vector = (total - large) // (layers + 1), max(total // 100_000, 1)
    sizes = [size for layer in range(layers) for size in (matrix - 7 * layer, vector)] + [large]
    return [*sizes, total - sum(sizes)]


class Slice(Protocol):
    """Parameters with their gradients, and a step over them."""

    gradients: list[Tensor]

    def step(self) -> None:
        """Update masters and working weights by the gradients."""

    def weights(self) -> list[tuple[Tensor, Tensor]]:
        """Working weight and master of each parameter."""


class ShardedSlice:
    """Stepped by lightning_ted."""

    def __init__(self, sizes: Sequence[int], device: torch.device, tile_size: int | None, offload: bool) -> None:
        values, self.gradients = values_of(sizes, device)
        self._parameters = [Parameter(value) for value in values]
        named = {f"p{index}": parameter for index, parameter in enumerate(self._parameters)}
        training = Training(
            named,
            TEDMesh(Topology(1)),
            {name: ParamLayout(name, tuple(parameter.shape)) for name, parameter in named.items()},
            PartitionOptions(),
            TrainingOptions(tile_size=tile_size, offload=offload),
            dict.fromkeys(named, torch.bfloat16),
            device,
        )
        self._optimizer = torch.optim.AdamW(self._parameters, **SETTINGS)
        training.shard([self._optimizer], lambda _: False)
        for parameter, gradient in zip(self._parameters, self.gradients, strict=True):
            parameter.grad = gradient

    def step(self) -> None:
        self._optimizer.step()

    def weights(self) -> list[tuple[Tensor, Tensor]]:
        share: ShardedStep = self._optimizer.sharded  # type: ignore[attr-defined]
        pairs = [(parameter.data, share.gather_master(parameter)) for parameter in self._parameters]
        return [(working, master) for working, master in pairs if master is not None]


class TorchSlice:
    """Stepped by torch, all at once: the gradients are cast to fp32, the optimizer steps, the masters are cast back."""

    def __init__(self, sizes: Sequence[int], device: torch.device, implementation: str) -> None:
        values, self.gradients = values_of(sizes, device)
        self._working = [value.to(torch.bfloat16) for value in values]
        flat = torch.cat(values)
        self._masters = [Parameter(part) for part in flat.split(list(sizes))]
        self._optimizer = torch.optim.AdamW(self._masters, **SETTINGS, **TORCH[implementation])

    @torch.no_grad()
    def step(self) -> None:
        for master, gradient in zip(self._masters, self.gradients, strict=True):
            master.grad = gradient.float()
        self._optimizer.step()
        self._optimizer.zero_grad()
        torch._foreach_copy_(self._working, [master.data for master in self._masters])

    def weights(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self._working, (master.data for master in self._masters), strict=True))


def values_of(sizes: Sequence[int], device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """fp32 weights and bf16 gradients, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    weights, gradients = [], []
    for size in sizes:
        weights.append(torch.empty(size).uniform_(-1, 1, generator=generator).to(device))
        gradients.append(torch.empty(size).uniform_(-1, 1, generator=generator).to(device, torch.bfloat16))
    return weights, gradients


def make_slice(sizes: Sequence[int], device: torch.device, variant: dict[str, Any]) -> Slice:
    """``variant``: ``{"implementation": ...}`` of torch, or ``{"tile_size": ..., "offload": ...}``."""
    if "implementation" in variant:
        return TorchSlice(sizes, device, **variant)
    return ShardedSlice(sizes, device, variant["tile_size"], variant.get("offload", False))


# -- what a step costs --------------------------------------------------------------------------------------------------


def measure_slice(
    sizes: Sequence[int], variant: dict[str, Any], device: str, steps: int, threads: Sequence[int]
) -> dict[str, Any]:
    """Step a slice and measure: extra memory of a step, time of ``steps`` others at each number of threads.

    Returns:
        ``extra_bytes`` at the peak of a step over what there was before it; ``cpu`` and ``wall``, by number of threads the
        seconds of each step; ``checksum`` of working weights and masters in the end; on CUDA ``copy_bandwidth`` in bytes
        per second, read and written.

    """
    where = torch.device(device)
    owned = make_slice(sizes, where, variant)
    for _ in range(WARMUP):
        step(owned, where)
    result: dict[str, Any] = {"extra_bytes": extra_memory(owned, where), "cpu": {}, "wall": {}}
    for count in threads:
        torch.set_num_threads(count)
        step(owned, where)
        times = [step(owned, where) for _ in range(steps)]
        result["cpu"][str(count)] = [cpu for cpu, _ in times]
        result["wall"][str(count)] = [wall for _, wall in times]
    result["checksum"] = checksum(owned)
    if where.type == "cuda":
        result["copy_bandwidth"] = copy_bandwidth(where)
    return result


def step(owned: Slice, device: torch.device) -> tuple[float, float]:
    """One step by new gradients: its CPU and its wall seconds."""
    for gradient in owned.gradients:
        gradient.mul_(-0.75)
    synchronize(device)
    cpu, wall = cpu_seconds(), time.perf_counter()
    owned.step()
    synchronize(device)
    return cpu_seconds() - cpu, time.perf_counter() - wall


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def extra_memory(owned: Slice, device: torch.device) -> int:
    """Bytes at the peak of one step, less those before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step(owned, device)
        return torch.cuda.max_memory_allocated(device) - before
    if sys.platform == "linux":
        # What earlier steps have freed and the C library has kept would hide what this one takes.
        ctypes.CDLL(None).malloc_trim(0)
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    step(owned, device)
    return status_bytes("VmHWM") - before


def checksum(owned: Slice) -> str:
    """Of all bits of the weights."""
    digest = hashlib.sha256()
    for pair in owned.weights():
        for weight in pair:
            digest.update(weight.cpu().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def copy_bandwidth(device: torch.device, size: int = 2**30, repeats: int = 10) -> float:
    """Bytes per second, read and written together, of a large copy within the device."""
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    target.copy_(source)
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        target.copy_(source)
    synchronize(device)
    return 2 * size * repeats / (time.perf_counter() - begin)
