"""Storage and first values for modules that were built without storage, on the meta device."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_ted.collectives.primitives import broadcast_
from lightning_ted.errors import UnsupportedError
from lightning_ted.mesh import TEDMesh


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's parameters and buffers without those of its children.

    Raises:
        UnsupportedError: For a buffer that is a DTensor.

    """
    for source in (module._parameters, module._buffers):
        for leaf, tensor in source.items():
            if tensor is None:
                continue
            if isinstance(tensor, DTensor):
                raise UnsupportedError(
                    f"the buffer '{leaf}' of {type(module).__name__} is a DTensor; only parameters may be. Leave it a plain "
                    "tensor, which every rank holds."
                )
            yield leaf, tensor


def own_tensor(module: nn.Module, leaf: str) -> Tensor:
    """The parameter or buffer ``leaf`` itself, where reading the attribute may give a DTensor made of it."""
    tensor = module._parameters[leaf] if leaf in module._parameters else module._buffers[leaf]
    assert tensor is not None
    return tensor


def common_seed(mesh: TEDMesh, device: torch.device | None) -> int:
    """Rank 0's seed, on every rank."""
    seed = torch.tensor([torch.initial_seed() % 2**62], device=device or torch.device("cpu"))
    return int(broadcast_(seed, mesh.axis("world")).item())


def materialise(
    module: nn.Module,
    name: str,
    seed: int,
    device: torch.device | None,
    placed: Mapping[str, tuple[int, ...]] | None = None,
    reset: Callable[[], object] | None = None,
) -> None:
    """Initialise the tensors of ``module`` itself, from numbers that depend on nothing but ``seed`` and ``name``.

    Those that have storage already keep their values.

    Args:
        module: Its children are not touched.
        name: Its qualified name.
        seed: The same on every rank.
        device: Where the tensors are to live; None for the CPU.
        placed: Which of them have been placed already, perhaps cut, with the shapes that they had whole.
        reset: What initialises it; None for its ``reset_parameters``.

    Raises:
        UnsupportedError: If it has no ``reset_parameters``, or one that leaves a tensor without values.

    """
    title = f"'{name}' ({type(module).__name__})" if name else type(module).__name__
    reset = reset or getattr(module, "reset_parameters", None)
    if reset is None:
        raise UnsupportedError(
            f"{title} was built without storage (`init_module(empty_init=True)`) and has no "
            "`reset_parameters()` to initialise it; add one, or build it with `empty_init=False`."
        )
    valued = {leaf: tensor for leaf, tensor in own_tensors(module) if not tensor.is_meta}
    versions: dict[str, int] = {}
    for leaf, tensor in own_tensors(module):
        if not tensor.is_meta:
            continue
        storage = torch.empty_like(tensor, device=device or torch.device("cpu"))
        if storage.is_floating_point() or storage.is_complex():
            storage.fill_(torch.nan)
        whole = nn.Parameter(storage, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else storage
        torch.utils.swap_tensors(tensor, whole)
        versions[leaf] = tensor._version
    cuda = [device] if device is not None and device.type == "cuda" else []
    with _kept(valued, placed or {}), torch.random.fork_rng(devices=cuda), torch.no_grad():
        torch.manual_seed((seed + zlib.crc32(name.encode())) % 2**63)
        reset()
    for leaf, tensor in own_tensors(module):
        if leaf in versions and _lacks_values(tensor, versions[leaf]):
            raise UnsupportedError(
                f"'{leaf}' of {title} was built without storage (`init_module(empty_init=True)`), "
                "and `reset_parameters()` does not write it; initialise it there, or build the module with `empty_init=False`."
            )


@contextmanager
def _kept(tensors: Mapping[str, Tensor], placed: Mapping[str, tuple[int, ...]]) -> Iterator[None]:
    """Put stand-ins into ``tensors``, so that whoever writes to them leaves their values alone."""
    values = {leaf: tensor.data for leaf, tensor in tensors.items()}
    for leaf, tensor in tensors.items():
        shape = placed.get(leaf, tuple(tensor.shape))
        # A whole tensor stands in for a part: the bounds and the random numbers of the others depend on its shape.
        tensor.data = tensor.data.clone() if shape == tuple(tensor.shape) else tensor.data.new_zeros(shape)
    try:
        yield
    finally:
        for leaf, tensor in tensors.items():
            tensor.data = values[leaf]


def _lacks_values(tensor: Tensor, version: int) -> bool:
    if tensor.is_floating_point() or tensor.is_complex():
        return bool(tensor.isnan().any())
    return tensor._version == version
