"""Random numbers under tensor parallelism: the same on replicated tensors, different on shards and on split tokens.

Note [Whose random numbers]
Tensor ranks draw from equal generators, the common stream: masks of replicated tensors agree, and so does the choice of a
block that skips itself at random. A stream of a rank's own is in use in two places only: between a column-parallel layer
and the row-parallel one after it, and, in a sequence-parallel stack, inside each dropout *module*. Both ends of a stream lie
in one module's forward, so that a forward that is repeated (activation checkpointing) or that raises leaves nothing switched.
Where the layers hang on the LightningModule itself, whose forward a step need not call, that end is the end of the step: what
draws after a column-parallel layer that no row-parallel one follows (an auxiliary head) draws this rank's own numbers till
then, so such a head belongs in a module of its own.

Functional dropout on split tokens draws from the common stream: ranks then drop the same places of different tokens, which
is unbiased. It takes more numbers on a rank that holds one token more, so each block that uses dropout runs on a stream of
its own too, equal on all ranks, whose end leaves the common one as it was. Inside a block, though, what is drawn after it
differs where the shares are uneven: a random choice that all ranks have to make alike has to be drawn before any functional
dropout of its block, or the block has to use dropout modules, which leave the common stream alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_ted.mesh import Axis


class RandomStream:
    """Switches the default generators to another stream, and back.

    The stream is seeded by a number drawn from the stream in use, so it has no state: whoever restores that one
    (activation checkpointing, resuming) gets the same numbers again. Streams may be nested.

    Args:
        offset: Ranks with different offsets draw different numbers.

    """

    def __init__(self, offset: int) -> None:
        self._offset = offset
        self._seed = 0
        self._outer: list[tuple[torch.Generator, Tensor]] = []

    @classmethod
    def of_rank(cls, axis: Axis) -> RandomStream:
        """A stream of this rank's own."""
        return cls(1 + axis.rank)

    @property
    def in_use(self) -> bool:
        """Whether the next number comes from this stream; not so if somebody has reset the generators since."""
        return bool(self._outer) and torch.default_generator.initial_seed() == self._seed

    def enter(self, device: torch.device) -> None:
        """Switch to this stream."""
        self._seed = int(torch.randint(2**62, (), dtype=torch.int64, device="cpu")) + self._offset
        generators = [torch.default_generator]
        if device.type == "cuda":
            index = device.index if device.index is not None else torch.cuda.current_device()
            generators.append(torch.cuda.default_generators[index])
        self._outer = [(generator, generator.get_state()) for generator in generators]
        for generator in generators:
            generator.manual_seed(self._seed)

    def leave(self) -> None:
        """Switch back; nothing happens where there is nothing to switch back to."""
        outer, self._outer = self._outer, []
        for generator, state in outer:
            generator.set_state(state)

    def surround(self, module: nn.Module) -> None:
        """Use this stream inside the forward of ``module`` while it trains, however the forward ends."""
        module.register_forward_pre_hook(self._before, with_kwargs=True)
        module.register_forward_hook(self._after, prepend=True, always_call=True)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensor = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if module.training and tensor is not None:
            self.enter(tensor.device)

    def _after(self, *_: Any) -> None:
        self.leave()

    def __deepcopy__(self, memo: dict[int, Any]) -> RandomStream:
        return RandomStream(self._offset)


def split_randomness(block: nn.Module, axis: Axis) -> None:
    """Prepare a block whose tokens are split over ``axis``; see Note [Whose random numbers]."""
    if not draws_dropout(block):
        return
    RandomStream(0).surround(block)
    for module in block.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            RandomStream.of_rank(axis).surround(module)


def draws_dropout(module: nn.Module) -> bool:
    """Whether a module or one of its children seems to use dropout, as a layer or by an attribute."""
    for child in module.modules():
        if isinstance(child, nn.modules.dropout._DropoutNd) and child.p > 0:
            return True
        if any("drop" in name and isinstance(value, float) and value > 0 for name, value in vars(child).items()):
            return True
    return False
