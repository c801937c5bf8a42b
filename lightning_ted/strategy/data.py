"""Tensor peers see the same samples, augmented in the same way; data-parallel ranks see different ones."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ted.collectives.primitives import all_gather, broadcast_
from lightning_ted.errors import TEDError
from lightning_ted.mesh import Axis, TEDMesh
from lightning_ted.strategy._compat import collect_rng_states, pl_worker_init_function, set_rng_states


def seed_workers(dataloader: object, data_rank: int) -> object:
    """Seed a loader's workers by the data rank where ``seed_everything(workers=True)`` asked for it.

    Lightning would seed them by the global rank, and so augment differently on tensor peers. A worker function of the
    user is left alone.
    """
    wanted = int(os.environ.get("PL_SEED_WORKERS", "0"))
    if wanted and isinstance(dataloader, DataLoader) and dataloader.worker_init_fn is None:
        dataloader.worker_init_fn = partial(pl_worker_init_function, rank=data_rank)
    return dataloader


def with_own_generator(dataloader: object, seed: int) -> torch.Generator | None:
    """Let a loader of an evaluation draw the seed of its workers, and its order, from another generator than training does.

    Returns:
        The generator; None if it has one of the user's, which is left alone, or needs none.

    """
    if not isinstance(dataloader, DataLoader) or dataloader.generator is not None:
        return None
    dataloader.generator = torch.Generator().manual_seed(seed)
    if getattr(dataloader.sampler, "generator", dataloader) is None:
        dataloader.sampler.generator = dataloader.generator  # type: ignore[attr-defined]
    return dataloader.generator


def equalize_random_state(tensor_axis: Axis, device: torch.device) -> None:
    """Give every tensor peer the random state (python, numpy, torch, cuda) of tensor rank 0.

    An unseeded script has other states in every process: peers would shuffle differently and drop different elements of
    activations that they share.
    """
    if tensor_axis.size == 1:
        return
    state = random_state(device)
    # The size differs between ranks (python caches a float now and then), so it goes first.
    packed = torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8).to(device)
    size = broadcast_(torch.tensor([packed.numel()], device=device), tensor_axis)
    if tensor_axis.rank != 0:
        packed = torch.empty(int(size.item()), dtype=torch.uint8, device=device)
    packed = broadcast_(packed, tensor_axis)
    if tensor_axis.rank != 0:
        restore_random_state(pickle.loads(packed.cpu().numpy().tobytes()), device)


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of the global generators and, on CUDA, of that of one device."""
    state = collect_rng_states(include_cuda=False)
    if device.type == "cuda":
        state["torch.cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Set the global generators and, on CUDA, that of one device."""
    state = dict(state)
    cuda = state.pop("torch.cuda", None)
    set_rng_states(state)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda, device)


def check_same_batch(batch: Any, stage: str, mesh: TEDMesh, device: torch.device) -> None:
    """Compare a batch with that of the tensor peers.

    Raises:
        TEDError: If they differ; in training on every rank of the world, otherwise on these peers.

    """
    size = mesh.topology.tensor
    if size == 1:
        return
    # In training over the whole world, so that all ranks stop together. In an evaluation a data rank may have no batch.
    axis = mesh.axis("world" if stage == "train" else "tensor")
    digests = all_gather(_digest(batch).to(device), axis).flatten().tolist()
    start = mesh.rank - axis.rank
    different = []
    for first in range(0, len(digests), size):
        peers = [start + peer for peer in range(first, first + size) if digests[peer] != digests[first]]
        if peers:
            different.append(f"rank(s) {', '.join(map(str, peers))} did not get the batch of rank {start + first}")
    if not different:
        return
    raise TEDError(
        f"The first batch of stage '{stage}' differs between tensor-parallel peers: {'; '.join(different)}. All "
        f"{size} ranks of a tensor-parallel group must see the same samples. HINT: keep "
        "`Trainer(use_distributed_sampler=True)`, or build your sampler with "
        "`num_replicas=trainer.strategy.data_parallel_size, rank=trainer.strategy.data_parallel_rank` and not with the "
        "world size and global rank; draw random numbers of a dataset from the global generators, or from one seeded by "
        "`data_parallel_rank`."
    )


def _digest(batch: Any) -> Tensor:
    digest = hashlib.blake2b(digest_size=8)
    for part in _parts(batch):
        digest.update(part)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.int64)


def _parts(value: Any) -> Iterator[bytes]:
    """The content of a batch as bytes; of unknown objects only the type, as their representation may hold an address."""
    if isinstance(value, Tensor):
        yield f"{tuple(value.shape)}{value.dtype}".encode()
        if value.layout is torch.strided and not value.is_quantized:
            yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, (str, bytes, int, float, bool, complex)) or value is None:
        yield repr(value).encode()
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield repr(key).encode()
            yield from _parts(item)
    elif isinstance(value, Sequence):
        yield f"{len(value)}".encode()
        for item in value:
            yield from _parts(item)
    else:
        yield type(value).__qualname__.encode()
