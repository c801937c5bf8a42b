"""What one rank does in the ablation: the same decoder in every variant, stepped in turns, with a clock on its collectives."""

from __future__ import annotations

import ctypes
import gc
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.namespaces import sent_bytes
from benchmarks.step import cpu_seconds, status_bytes
from examples.decoder.model import Decoder, DecoderConfig
from lightning_ted.collectives import primitives
from lightning_ted.collectives.phase import current_phase
from lightning_ted.collectives.recorder import CommRecorder
from lightning_ted.mesh import Axis, TEDMesh
from lightning_ted.moe import auxiliary_loss
from lightning_ted.optim.options import TrainingOptions
from lightning_ted.recompute import RecomputeOptions, checkpoint_blocks
from lightning_ted.strategy.partition import PartitionOptions, partition_module
from lightning_ted.strategy.training import Training
from lightning_ted.topology import Topology

RANKS, RANKS_PER_NODE = 4, 2
#: Tensor ranks share a node; the expert axis, and so every all-to-all, crosses between the two.
TOPOLOGY = Topology(RANKS, tensor=2, expert=2, expert_tensor=2)
#: Between variants that compute the same in another order; the losses are about 5.
ROUNDING = 1e-4


@dataclass(frozen=True)
class Variant:
    """A row of the table.

    Attributes:
        title: What the table calls it.
        drops: Duplicate token dropping (DTD).
        recompute: Arguments of :class:`RecomputeOptions`; None for no activation checkpointing.
        chunked: Tokens travel in chunks.

    """

    title: str
    drops: bool
    recompute: Mapping[str, Any] | None
    chunked: bool = False


FULL, KEPT = {"mode": "full"}, {"mode": "comm_aware"}
BASELINE, BOTH = "baseline", "both"
VARIANTS = {
    BASELINE: Variant("baseline", False, FULL),
    "dtd": Variant("+ DTD", True, FULL),
    "cac": Variant("+ CAC", False, KEPT),
    BOTH: Variant("both", True, KEPT),
    "both_default": Variant('both, policy "default"', True, {**KEPT, "keep": "default"}),
    "both_all_to_all": Variant('both, policy "all_to_all"', True, {**KEPT, "keep": "all_to_all"}),
    "both_chunks": Variant("both, in chunks", True, KEPT, chunked=True),
    "none": Variant("DTD, no checkpointing", True, None),
}
MAIN = (BASELINE, "dtd", "cac", BOTH)


# -- time in collectives ------------------------------------------------------------------------------------------------


class CollectiveClock:
    """A context in which the time that this rank is held up by collectives is added up, by what they are for.

    It stands in the place of the operators that the package's collectives are made of: starting one and waiting for it are
    timed, what happens in between is not. Waiting for a rank that is late counts, too.

    Attributes:
        seconds: By :func:`purpose`.

    """

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._operators = primitives._ops
        self._purpose = "other"
        self._under_way: dict[int, str] = {}
        self._patches = ExitStack()

    def __enter__(self) -> CollectiveClock:
        note, broadcast_ = primitives._note, primitives.broadcast_

        def timed_note(axis: Axis, kind: str, sent: int) -> None:
            self._purpose = purpose(kind, axis.name, current_phase())
            note(axis, kind, sent)

        def timed_broadcast(tensor: Tensor, axis: Axis, src: int = 0) -> Tensor:
            with self.measure(purpose("broadcast", axis.name, current_phase())):
                return broadcast_(tensor, axis, src)

        for name, stand_in in (("_note", timed_note), ("_ops", self), ("broadcast_", timed_broadcast)):
            self._patches.enter_context(patch.object(primitives, name, stand_in))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    @contextmanager
    def measure(self, label: str) -> Iterator[None]:
        """Add the time within the context."""
        began = time.perf_counter()
        yield
        self.seconds[label] += time.perf_counter() - began

    def wait_tensor(self, tensor: Tensor) -> Tensor:
        """The operator of this name."""
        with self.measure(self._under_way.pop(tensor.data_ptr(), "other")):
            return self._operators.wait_tensor(tensor)

    def __getattr__(self, name: str) -> Any:
        operator = getattr(self._operators, name)

        def start(*args: Any, **kwargs: Any) -> Tensor:
            # Every collective is noted just before it is started.
            label = self._purpose
            with self.measure(label):
                pending = operator(*args, **kwargs)
            self._under_way[pending.data_ptr()] = label
            return pending

        return start


def purpose(kind: str, axis: str, phase: str) -> str:
    """What a collective is for: its kind, if it is a layer's."""
    if phase == "optimizer":
        return "weights"
    if phase == "backward" and axis in ("data", "expert_data", "world"):
        return "gradients"
    return kind


# -- variants -----------------------------------------------------------------------------------------------------------


@dataclass
class Trained:
    """A variant's model and what trains it."""

    model: Decoder
    training: Training
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, variant: Variant, config: DecoderConfig, mesh: TEDMesh, chunks: int) -> Trained:
        """Cut the decoder and let it be recomputed as the strategy does."""
        options = PartitionOptions(
            duplicate_token_dropping=variant.drops, overlap_chunks=chunks if variant.chunked else 1
        )
        torch.manual_seed(0)
        model = Decoder(config)
        layouts = partition_module(model, mesh, options)
        if variant.recompute is not None:
            checkpoint_blocks(model, RecomputeOptions(**variant.recompute))
        cpu, parameters = torch.device("cpu"), dict(model.named_parameters())
        training = Training(parameters, mesh, layouts, options, TrainingOptions(), {}, cpu)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        training.shard([optimizer], lambda _: False)
        return cls(model, training, optimizer)

    def step(self, tokens: Tensor) -> None:
        """One step; the loss is noted."""
        logits = self.model(tokens)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()) + auxiliary_loss(self.model)
        with self.training.backward():
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(float(loss.detach()))


def batch(config: DecoderConfig, sequences: int, index: int, data: int) -> Tensor:
    """Random tokens ``[sequences, sequence_length]``, others for every step and data rank."""
    generator = torch.Generator().manual_seed(1000 * index + data)
    return torch.randint(config.vocab_size, (sequences, config.sequence_length), generator=generator)


def same_losses(losses: Mapping[str, list[float]]) -> dict[str, str]:
    """How each variant's losses compare with the baseline's: ``"same bits"``, or the largest relative difference.

    Raises:
        RuntimeError: If a variant computes something else: other bits than the first with the same tokens on each rank, or
            more than rounding away from the baseline.

    """
    found, first_of = {}, {}
    for name, own in losses.items():
        variant = VARIANTS[name]
        first = first_of.setdefault((variant.drops, variant.chunked), name)
        if own != losses[first]:
            raise RuntimeError(f"`{name}` has the losses {own}, but `{first}`, which sends the same, {losses[first]}.")
        reference = losses[next(iter(losses))]
        apart = max(abs(a - b) / abs(b) for a, b in zip(own, reference, strict=True))
        if not apart <= ROUNDING:
            raise RuntimeError(f"`{name}` has the losses {own}, which are not {reference} to rounding.")
        found[name] = "same bits" if own == reference else f"{apart:.1e}"
    return found


# -- measuring ----------------------------------------------------------------------------------------------------------


def run_rank(**arguments: Any) -> dict[str, Any]:
    """:func:`measure_variants` in a process that has not joined the others yet."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = measure_variants(**arguments)
    dist.barrier()
    dist.destroy_process_group()
    return found


def measure_variants(
    names: list[str], shape: Mapping[str, Any], sequences: int, chunks: int, warmup: int, steps: int
) -> dict[str, Any]:
    """On one rank of four: step the variants in turns, on the same tokens.

    Args:
        names: Of :data:`VARIANTS`; the first is what losses are compared with.
        shape: Of the decoder; see :class:`DecoderConfig`.
        sequences: Of each data rank in a step.
        chunks: In how many chunks tokens travel where they do.
        warmup: Steps that are not counted, in which the losses are compared.
        steps: Steps of each variant that are measured.

    Returns:
        ``losses``: how they compare (see :func:`same_losses`); ``parameters`` of the whole model; and for each variant
        ``peak``: bytes that a step takes at its peak, and the measured ``steps``.

    """
    config, mesh = DecoderConfig.gpt(**shape), TEDMesh(TOPOLOGY, ranks_per_node=RANKS_PER_NODE)
    trained = {name: Trained.of(VARIANTS[name], config, mesh, chunks) for name in names}
    data = TOPOLOGY.coordinates(dist.get_rank()).data
    found: dict[str, Any] = {name: {"steps": []} for name in names}
    for index in range(warmup):
        tokens = batch(config, sequences, index, data)
        for name, one in trained.items():
            found[name]["peak"] = measure_memory(
                one, tokens
            )  # the last step's, which has the optimizer's state already
    losses = same_losses({name: one.losses for name, one in trained.items()})
    for index in range(warmup, warmup + steps):
        tokens = batch(config, sequences, index, data)
        for name, one in trained.items():
            found[name]["steps"].append(measure_step(one, tokens, mesh))
    return {"losses": losses, "parameters": config.num_params(), "variants": found}


def measure_memory(one: Trained, tokens: Tensor) -> int:
    """Bytes at the peak of a step, less those before it."""
    gc.collect()
    # What earlier steps have freed and the C library has kept would hide what this one takes.
    ctypes.CDLL(None).malloc_trim(0)
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    one.step(tokens)
    return status_bytes("VmHWM") - before


def measure_step(one: Trained, tokens: Tensor, mesh: TEDMesh) -> dict[str, Any]:
    """One step, from when all ranks begin until all have ended.

    Returns:
        ``seconds``; of these, by purpose, those ``blocked``; seconds of all threads (``cpu``); ``bytes`` and ``calls`` by
        ``"kind/axis/phase"``; bytes ``kept`` by ``"kind/axis"``; and what the node's interface has sent (``link``).

    """
    gc.collect()
    dist.barrier()
    before, recorder = sent_bytes(), CommRecorder()
    with CollectiveClock() as clock, mesh.recording(recorder):
        began, cpu = time.perf_counter(), cpu_seconds()
        one.step(tokens)
        with clock.measure("end"):
            dist.barrier()
        seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "cpu": cpu_seconds() - cpu,
        "blocked": dict(clock.seconds),
        "bytes": {"/".join(key): count for key, count in recorder.bytes_by.items()},
        "calls": {"/".join(key): count for key, count in recorder.calls_by.items()},
        "kept": {"/".join(key): count for key, count in recorder.kept.items()},
        "link": sent_bytes() - before,
    }
