"""How much of the gradients' reduction is started while backward still runs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F

from examples.decoder.model import Decoder, DecoderConfig
from lightning_ted.mesh import TEDMesh
from lightning_ted.moe import auxiliary_loss
from lightning_ted.optim import reducer
from lightning_ted.optim.options import TrainingOptions
from lightning_ted.optim.shared_bucket import SharedBucket
from lightning_ted.strategy.partition import PartitionOptions, partition_module
from lightning_ted.strategy.training import Training
from lightning_ted.topology import Topology

RANKS = 4
BATCH, SEQUENCE = 4, 256
#: Tensor and expert degree.
LAYOUTS = {"ep4": (1, 4), "tp2_ep2": (2, 2)}
TITLES = {"ep4": "expert 4", "tp2_ep2": "tensor 2 x expert 2"}


def overlap_of_rank(**arguments: Any) -> list[dict[str, Any]]:
    """:func:`overlap_of_world` in a process that has not joined the others yet."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = overlap_of_world(**arguments)
    dist.barrier()
    dist.destroy_process_group()
    return rows


def overlap_of_world(
    layout: str,
    zero_stages: Sequence[int],
    bucket_sizes: Sequence[int],
    passes: int,
    config: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """On one rank of four: train the example's decoder for some passes, the first of which only learns the order.

    Args:
        layout: Of :data:`LAYOUTS`.
        zero_stages: 1, 2 or both.
        bucket_sizes: In elements.
        passes: How many passes are counted.
        config: Changes of the model's shape.

    Returns:
        For each stage and size, of the counted passes together: bytes of ``sent``, and of those whose reduction was started
        by a gradient, so before backward had ended (``sent_early``); ``ahead``: the share of backward's time that was still
        to come when a byte's reduction was started, and ``possible`` when its gradient was there, means over bytes; the
        number of ``buckets``.

    """
    rows = []
    for zero_stage in zero_stages:
        for bucket_size in bucket_sizes:
            with patch.object(reducer, "BUCKET_SIZE", bucket_size):
                row = _train(layout, zero_stage, passes, DecoderConfig.qwen3_moe(**(config or {})))
            rows.append({"layout": layout, "zero_stage": zero_stage, "bucket_size": bucket_size, **row})
    return rows


def _train(layout: str, zero_stage: int, passes: int, config: DecoderConfig) -> dict[str, Any]:
    topology = Topology(dist.get_world_size(), *LAYOUTS[layout])
    data = topology.coordinates(dist.get_rank()).data
    row: dict[str, Any] = {"sent": 0, "sent_early": 0, "ahead": 0.0, "possible": 0.0}
    with _Clock() as clock:
        module, training, optimizer = _prepare(topology, zero_stage, config)
        for index in range(passes + 1):
            loss = _loss(module, index, data)
            clock.start()
            with training.backward():
                loss.backward()
                clock.stop()
            optimizer.step()
            optimizer.zero_grad()
            if index > 0:
                row["sent"] += training.reducer.sent
                row["sent_early"] += training.reducer.sent_early
                row["ahead"] += clock.ahead(clock.reductions) / passes
                row["possible"] += clock.ahead(clock.gradients) / passes
        training.close()
    return {**row, "buckets": len(clock.reductions)}


class _Clock:
    """Notes when gradients are there, and when their reductions are started."""

    def __init__(self) -> None:
        self.gradients: list[tuple[float, int]] = []  # time, bytes
        self.reductions: list[tuple[float, int]] = []
        self._began = self._ended = 0.0
        self._patches = ExitStack()

    def __enter__(self) -> _Clock:
        take, reduce = SharedBucket.take, SharedBucket.start_reducing

        def timed_take(bucket: SharedBucket, index: int) -> None:
            parameter = bucket.parameters[index]
            self.gradients.append((time.perf_counter(), parameter.numel() * parameter.element_size()))
            take(bucket, index)

        def timed_reduce(bucket: SharedBucket) -> int:
            began = time.perf_counter()
            sent = reduce(bucket)
            self.reductions.append((began, sent))
            return sent

        self._patches.enter_context(patch.object(SharedBucket, "take", timed_take))
        self._patches.enter_context(patch.object(SharedBucket, "start_reducing", timed_reduce))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def start(self) -> None:
        """Backward begins."""
        self.gradients.clear()
        self.reductions.clear()
        self._began = time.perf_counter()

    def stop(self) -> None:
        """Backward has ended."""
        self._ended = time.perf_counter()

    def ahead(self, events: list[tuple[float, int]]) -> float:
        """The share of backward's time that was still to come, the mean over bytes."""
        time_ahead = sum(max(self._ended - at, 0) * count for at, count in events)
        return time_ahead / max(sum(count for _, count in events), 1) / (self._ended - self._began)


def _prepare(
    topology: Topology, zero_stage: int, config: DecoderConfig
) -> tuple[Decoder, Training, torch.optim.Optimizer]:
    mesh, options = TEDMesh(topology), PartitionOptions()
    torch.manual_seed(0)
    module = Decoder(config)
    layouts = partition_module(module, mesh, options)
    parameters = dict(module.named_parameters())
    cpu = torch.device("cpu")
    training = Training(parameters, mesh, layouts, options, TrainingOptions(zero_stage=zero_stage), {}, cpu)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    training.shard([optimizer], lambda _: False)
    return module, training, optimizer


def _loss(module: Decoder, index: int, data: int) -> torch.Tensor:
    """On other tokens for every data rank and pass."""
    generator = torch.Generator().manual_seed(1000 * index + data)
    length = min(SEQUENCE, module.config.sequence_length)
    tokens = torch.randint(module.config.vocab_size, (BATCH, length), generator=generator)
    logits = module(tokens)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()) + auxiliary_loss(module)


def merge(ranks: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of all ranks together."""
    rows = []
    for parts in zip(*ranks, strict=True):
        sent = sum(part["sent"] for part in parts)
        row = {key: parts[0][key] for key in ("layout", "zero_stage", "bucket_size")}
        row |= {"sent_bytes": sent, "early_share": sum(part["sent_early"] for part in parts) / max(sent, 1)}
        row |= {key: sum(part[key] for part in parts) / len(parts) for key in ("ahead", "possible", "buckets")}
        rows.append(row)
    return rows


def lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The table as text."""
    yield f"{'layout':20} {'ZeRO':>4} {'bucket':>8} {'buckets':>7} {'MB':>7} {'early':>7} {'ahead':>7} {'possible':>8}"
    for row in rows:
        yield (
            f"{TITLES[row['layout']]:20} {row['zero_stage']:4d} {row['bucket_size']:8d} {row['buckets']:7.1f} "
            f"{row['sent_bytes'] / 1e6:7.1f} {row['early_share']:7.1%} {row['ahead']:7.1%} {row['possible']:8.1%}"
        )
