"""Sequence parallelism: between tensor-parallel regions, activations are split over tokens (arXiv 2205.05198)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ted.collectives.phase import in_backward
from lightning_ted.collectives.primitives import all_reduce
from lightning_ted.collectives.tape import is_replayed, kept
from lightning_ted.collectives.tensor import gather_tokens_to_shards, row_linear_to_tokens
from lightning_ted.collectives.tokens import drop, restore, shares
from lightning_ted.errors import UnsupportedError
from lightning_ted.mesh import Axis
from lightning_ted.tensor_parallel.randomness import split_randomness


class SequenceRegion:
    """A stack of blocks whose hidden states are split along the sequence, dimension -2 of ``[batch, sequence, width]``.

    Column-parallel layers inside gather the tokens, row-parallel layers reduce-scatter them; all else in a block sees split
    tokens, so the gradients of its weights are partial. A length that the axis does not divide is shared out unevenly, so
    the whole length, which a share does not tell, is kept from the entry of the region.

    Attributes:
        name: Qualified name of the stack, an nn.ModuleList or nn.Sequential.
        axis: The tensor axis.
        blocks: Qualified names of the blocks, in order; ``modules`` are the modules behind them, each once.

    """

    def __init__(self, name: str, axis: Axis, blocks: Sequence[str], modules: Sequence[nn.Module]) -> None:
        self.name = name
        self.axis = axis
        self.blocks = list(blocks)
        self._length = 0
        self._varies = False
        modules[0].register_forward_pre_hook(self._enter, with_kwargs=True)
        modules[-1].register_forward_hook(self._leave)
        for block in modules:
            split_randomness(block, axis)

    @property
    def length(self) -> int:
        """Tokens of a sequence, those of all ranks together, in the running forward or, if it is recomputed, in that one."""
        return kept("choice", None, f"length of '{self.name}'", lambda: self._length)

    def contains(self, name: str) -> bool:
        """Whether the module or parameter of this qualified name belongs to a block."""
        return any(f"{name}.".startswith(f"{block}.") for block in self.blocks)

    def gather(self, x: Tensor) -> Tensor:
        """All tokens, for column-parallel weights."""
        return gather_tokens_to_shards(x, x.dim() - 2, self._sizes(x), self.axis)

    def split(self, x: Tensor) -> Tensor:
        """This rank's tokens of what is the same on every rank."""
        return drop(x, self.axis, dim=x.dim() - 2)

    def whole(self, x: Tensor) -> Tensor:
        """All tokens, for what is the same on every rank."""
        return restore(x, sum(self._sizes(x)), self.axis, dim=x.dim() - 2)

    def linear_scatter(self, x: Tensor, weight: Tensor) -> Tensor:
        """This rank's tokens of the sum of the partial results of a row-parallel weight."""
        return row_linear_to_tokens(x, weight, shares(x.shape[-2], self.axis.size), self.axis)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else None
        if not isinstance(hidden, Tensor) or hidden.dim() < 2 or not hidden.is_floating_point():
            raise UnsupportedError(
                f"`sequence_parallel=True` needs the hidden states [batch, sequence, width] as first positional argument of "
                f"the blocks of '{self.name}'; pass them so, or set `sequence_parallel=False`."
            )
        self._varies |= self._length not in (0, hidden.shape[-2])
        self._length = hidden.shape[-2]
        return (self.split(hidden), *args[1:]), kwargs

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(hidden, Tensor) or hidden.dim() < 2:
            raise UnsupportedError(
                f"`sequence_parallel=True` needs the hidden states [batch, sequence, width] as what the blocks of '{self.name}' "
                f"return, alone or first in a tuple, not a {type(output).__name__}; or set `sequence_parallel=False`."
            )
        hidden = restore(hidden, self.length, self.axis, dim=hidden.dim() - 2)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _sizes(self, x: Tensor) -> list[int]:
        """Every rank's tokens; refused if ``x`` has others, which would otherwise hang in the exchange."""
        length = self.length
        sizes = shares(length, self.axis.size)
        expected = sizes[self.axis.rank]
        fits = x.shape[-2] == expected
        if self._varies and in_backward() and not is_replayed("choice"):
            # In the user's own checkpoint. Shares of two lengths may differ on some ranks only; here, where lengths get mixed
            # up, all of them raise.
            fits = bool(all_reduce(torch.tensor(int(fits), device=x.device), self.axis, "min"))
        if not fits:
            raise UnsupportedError(
                f"`sequence_parallel=True`: a layer in '{self.name}' received {x.shape[-2]} tokens where {expected} of "
                f"{length} were expected on this or another rank; the blocks must keep the sequence's length. Under "
                "activation checkpointing, do not run two forwards of different lengths before a backward: call backward "
                "after each, or pad them to one length."
            )
        return sizes
