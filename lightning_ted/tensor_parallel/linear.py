"""Column- and row-parallel linear layers (arXiv 1909.08053, section 3).

A layer of the model keeps its identity: its class is swapped and its parameters are cut in place, so optimizers, tied
names and copies of the module stay valid. ``weight`` is ``[out_features, in_features]``.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ted.collectives.tensor import (
    autocast_dtype,
    copy_to_shards,
    gather_features,
    row_linear,
    split_features,
    to_autocast,
)
from lightning_ted.mesh import Axis
from lightning_ted.tensor_parallel.randomness import RandomStream
from lightning_ted.tensor_parallel.sequence import SequenceRegion


class ShardedRegion:
    """What column- and row-parallel layers that belong together share: their input, and random numbers of their own.

    Column-parallel siblings that read the same tensor (query, key, value; gate, up) hand it over once, so their
    gradients for it are added before the one all-reduce; with sequence parallelism it is gathered once, too. Between
    the first of them and the row-parallel layer, features are split and random numbers come from this rank's stream.
    """

    def __init__(self, axis: Axis, sequence: SequenceRegion | None, readers: int, random: bool) -> None:
        self.axis = axis
        self.sequence = sequence
        self._readers = readers
        self._stream = RandomStream.of_rank(axis) if random else None
        self._key: tuple[Any, ...] | None = None
        self._shared: Tensor | None = None
        self._reads = 0
        self._is_interrupted = False

    def enter(self, x: Tensor, training: bool) -> Tensor:
        """The input of a column-parallel layer, handed over to the shards once for all siblings that read it."""
        # Siblings find the stream in use. One that a forward has left behind, after whose end somebody reset the
        # generators (the recomputation of a checkpoint), is not in use and begins anew.
        if training and self._stream is not None and not self._stream.in_use:
            self._stream.enter(x.device)
        if self._readers == 1:
            return self._hand_over(x)
        # The tensor itself is held, not its id: an id may be used again.
        # A compiler cannot ask for versions; while training, autograd needs the input of every sibling unchanged anyway.
        version = None if torch.compiler.is_compiling() or x.is_inference() else x._version
        key = (version, x.requires_grad, torch.is_grad_enabled(), autocast_dtype(x))
        if self._key is None or self._key[0] is not x or self._key[1:] != key:
            self._key, self._shared, self._reads = (x, *key), self._hand_over(x), 0
        shared = self._shared
        assert shared is not None
        self._reads += 1
        if self._reads == self._readers:
            self._forget()
        return shared

    def leave(self) -> None:
        """What follows works on replicated tensors (or split tokens) again."""
        if self._stream is not None and self._stream.in_use:
            self._stream.leave()

    def except_in(self, module: nn.Module) -> None:
        """Let a module inside (the dropout of an adapter, whose input is whole) draw the numbers that all ranks draw."""
        module.register_forward_pre_hook(self._interrupt)
        module.register_forward_hook(self._resume, prepend=True, always_call=True)

    def _interrupt(self, *_: Any) -> None:
        self._is_interrupted = self._stream is not None and self._stream.in_use
        self.leave()

    def _resume(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        interrupted, self._is_interrupted = self._is_interrupted, False
        if interrupted and self._stream is not None:
            self._stream.enter(args[0].device)

    def close(self, *_: Any) -> None:
        """Forward hook of the module that owns the layers: nothing outlives a forward, however it ended."""
        self._forget()
        self.leave()

    def _hand_over(self, x: Tensor) -> Tensor:
        x = to_autocast(x)
        return copy_to_shards(x, self.axis) if self.sequence is None else self.sequence.gather(x)

    def _forget(self) -> None:
        self._key = self._shared = None

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedRegion:
        # What is shared belongs to one forward and carries its graph, which cannot be copied.
        return ShardedRegion(self.axis, deepcopy(self.sequence, memo), self._readers, self._stream is not None)


class ColumnParallelLinear(nn.Linear):
    """Each rank holds some output features: ``y_t = x @ weight_t.T + bias_t``."""

    region: ShardedRegion
    gather_output: bool

    @classmethod
    def adopt(cls, linear: nn.Linear, region: ShardedRegion, gather_output: bool) -> None:
        """Make ``linear`` column-parallel; its parameters are cut by the caller."""
        linear.__class__ = cls
        linear.region, linear.gather_output = region, gather_output  # type: ignore[assignment]
        linear.out_features //= region.axis.size

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features / t]``, or all features (of split tokens) where the output is gathered."""
        output = F.linear(self.region.enter(input, self.training), self.weight, self.bias)
        if not self.gather_output:
            return output
        self.region.leave()
        whole = gather_features(output, self.region.axis)
        # In a stack whose tokens are split, whatever sees whole features sees split tokens.
        return whole if self.region.sequence is None else self.region.sequence.split(whole)


class RowParallelLinear(nn.Linear):
    """Each rank holds some input features: ``y = sum_t x_t @ weight_t.T + bias``."""

    region: ShardedRegion
    split_input: bool

    @classmethod
    def adopt(cls, linear: nn.Linear, region: ShardedRegion, split_input: bool) -> None:
        """Make ``linear`` row-parallel; its parameters are cut by the caller."""
        linear.__class__ = cls
        linear.region, linear.split_input = region, split_input  # type: ignore[assignment]
        linear.in_features //= region.axis.size

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features / t] -> [..., out_features]``."""
        axis, sequence = self.region.axis, self.region.sequence
        self.region.leave()
        input = to_autocast(input)
        if self.split_input:
            input = split_features(input if sequence is None else sequence.whole(input), axis)
        if sequence is None:
            output = row_linear(input, self.weight, axis)
        else:
            output = sequence.linear_scatter(input, self.weight)
        return output if self.bias is None else output + self.bias.to(output.dtype)


class FeaturesOfHeads:
    """Forward hook of a whole layer whose last output features go to this rank's heads, and past any column-parallel layer.

    Each rank's heads give them a part of their gradient; the sum is the whole. (The rotary part of the keys in multi-head latent
    attention, arXiv 2405.04434, section 2.1.3.)

    Args:
        axis: The tensor axis.
        features: How many.

    """

    def __init__(self, axis: Axis, features: int) -> None:
        self.axis = axis
        self.features = features

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """``[..., out_features]``, unchanged."""
        others, own = output.split([output.shape[-1] - self.features, self.features], -1)
        return torch.cat([others, copy_to_shards(own, self.axis)], -1)
