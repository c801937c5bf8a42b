"""Sequence parallelism: between tensor-parallel regions, activations are split over tokens (arXiv 2205.05198)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_ted.collectives.tensor import gather_tokens_to_shards, sum_shards_to_tokens
from lightning_ted.collectives.tokens import drop, restore, shares
from lightning_ted.errors import UnsupportedError
from lightning_ted.mesh import Axis
from lightning_ted.tensor_parallel.randomness import ShardRandomness, draws_dropout


class SequenceRegion:
    """A stack of blocks whose hidden states are split along the sequence, dimension -2 of ``[batch, sequence, width]``.

    Column-parallel layers inside gather the tokens, row-parallel layers reduce-scatter them. A length that the axis
    does not divide is shared out unevenly, so the whole length, which a share does not tell, is kept from the entry of
    the region.
    """

    def __init__(self, name: str, axis: Axis) -> None:
        self.name = name
        self.axis = axis
        self.length = 0
        self._randomness: ShardRandomness | None = None

    def install(self, first: nn.Module, last: nn.Module, stack: nn.Module) -> None:
        """Split what enters ``first``, and gather what leaves ``last``."""
        self._randomness = ShardRandomness(self.axis) if draws_dropout(stack) else None
        first.register_forward_pre_hook(self._enter, with_kwargs=True)
        last.register_forward_hook(self._leave, always_call=True)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args or not isinstance(args[0], Tensor) or args[0].dim() < 2:
            raise UnsupportedError(
                f"`sequence_parallel=True` needs the hidden states [batch, sequence, width] as first positional argument of "
                f"the blocks of '{self.name}'; pass them so, or set `sequence_parallel=False`."
            )
        hidden = args[0]
        self.length = hidden.shape[-2]
        if module.training and self._randomness is not None:
            self._randomness.enter(hidden.device)
        return (drop(hidden, self.axis, dim=hidden.dim() - 2), *args[1:]), kwargs

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._randomness is not None:
            self._randomness.leave()
        if isinstance(output, Tensor):
            return restore(output, self.length, self.axis, dim=output.dim() - 2)
        if isinstance(output, tuple):
            return (restore(output[0], self.length, self.axis, dim=output[0].dim() - 2), *output[1:])
        return output

    def gather(self, x: Tensor) -> Tensor:
        """All tokens, for column-parallel weights."""
        return gather_tokens_to_shards(x, x.dim() - 2, self._sizes(x), self.axis)

    def whole(self, x: Tensor) -> Tensor:
        """All tokens, for what is the same on every rank; unchanged where they are all there already."""
        return x if x.shape[-2] == self.length else restore(x, self.length, self.axis, dim=x.dim() - 2)

    def scatter(self, x: Tensor) -> Tensor:
        """This rank's tokens of the sum of partial results of row-parallel weights."""
        return sum_shards_to_tokens(x, x.dim() - 2, shares(x.shape[-2], self.axis.size), self.axis)

    def _sizes(self, x: Tensor) -> list[int]:
        sizes = shares(self.length, self.axis.size)
        if x.shape[-2] != sizes[self.axis.rank]:
            raise UnsupportedError(
                f"`sequence_parallel=True`: a column-parallel layer in '{self.name}' received {x.shape[-2]} tokens where "
                f"{sizes[self.axis.rank]} of {self.length} were expected; the blocks must keep the sequence's length."
            )
        return sizes
