"""Random numbers under tensor parallelism: the same on replicated tensors, different on shards."""

from __future__ import annotations

import torch
from torch import nn

from lightning_ted.mesh import Axis


class ShardRandomness:
    """Switches the default generators to a stream of this tensor rank's own, and back.

    The stream is seeded by a number drawn from the common stream, so it has no state: whoever restores the common
    stream (activation checkpointing, resuming) gets the same numbers again, on shards too.
    """

    def __init__(self, axis: Axis) -> None:
        self._axis = axis
        self._common: list[tuple[torch.Generator, torch.Tensor]] = []

    def enter(self, device: torch.device) -> None:
        """Switch to the own stream; nothing happens if it is in use."""
        if self._common:
            return
        seed = int(torch.randint(2**62, (), dtype=torch.int64))
        generators = [torch.default_generator]
        if device.type == "cuda":
            index = device.index if device.index is not None else torch.cuda.current_device()
            generators.append(torch.cuda.default_generators[index])
        self._common = [(generator, generator.get_state()) for generator in generators]
        for generator in generators:
            generator.manual_seed(seed + 1 + self._axis.rank)

    def leave(self) -> None:
        """Switch back to the common stream; nothing happens if it is in use."""
        common, self._common = self._common, []
        for generator, state in common:
            generator.set_state(state)

    def __deepcopy__(self, memo: dict[int, object]) -> ShardRandomness:
        return ShardRandomness(self._axis)


def draws_dropout(module: nn.Module) -> bool:
    """Whether a module or one of its children seems to use dropout, as a layer or by an attribute."""
    for child in module.modules():
        if isinstance(child, nn.modules.dropout._DropoutNd) and child.p > 0:
            return True
        if any("drop" in name and isinstance(value, float) and value > 0 for name, value in vars(child).items()):
            return True
    return False
