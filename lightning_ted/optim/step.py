"""The step over this rank's share of the parameters, tile by tile (TED, arXiv 2303.06318, section 4).

A tile's gradients are turned into the masters' dtype, scaled and clipped in one buffer that all tiles use; so beside the
state itself, a step needs the memory of one tile, however large the share is.
"""

from __future__ import annotations

from collections import Counter, deque

import torch
from torch import Tensor

from lightning_ted.collectives.phase import during
from lightning_ted.optim.fused import fused_where_possible
from lightning_ted.optim.gradient_buffer import GradientBuffer
from lightning_ted.optim.segments import Work
from lightning_ted.optim.share import OptimizerShare
from lightning_ted.optim.stand_ins import StandInStepper, Update, without_hooks


class ShardedStep(OptimizerShare):
    """This rank's share, and the step over it."""

    @torch.no_grad()
    @during("optimizer")
    def step(self, update: Update) -> None:
        """Step this rank's share by ``update``, the optimizer's own arithmetic, and exchange the weights. A collective."""
        self._reattach()
        group_of = {p: index for index, group in enumerate(self.optimizer.param_groups) for p in group["params"]}
        work = [Work.of(tile, group_of) for tile in self._tiles]
        work = [one for one in work if one.parts]
        tiles = [one.tile for one in work]
        buffer = GradientBuffer(self._scale, max((sum(segment.size for segment in tile) for tile in tiles), default=0))
        left = Counter(segment.bucket for tile in tiles for segment in tile)
        # In one order on all ranks, whatever they own.
        waiting = deque(self._buckets)
        with fused_where_possible(self.optimizer, self._device), without_hooks(self.optimizer):
            stepper = StandInStepper(self.optimizer, update)
            # First, so that it goes on behind the last tile, too.
            for _, one in zip(tiles if self._store is None else self._store.visit(tiles), work, strict=True):
                _step_tile(one, stepper, buffer)
                left.subtract(segment.bucket for segment in one.tile)
                while waiting and not left[waiting[0]]:
                    waiting.popleft().start_gathering_weights()
            stepper.finish()
        for bucket in waiting:
            bucket.start_gathering_weights()
        for bucket in self._buckets:
            if not self._options.overlap_weights:
                bucket.wait_for_weights()
            bucket.after_step()
        self._scale = None
        self.steps += 1

    def _reattach(self) -> None:
        """Follow parameters whose memory somebody has replaced."""
        for bucket in self._buckets:
            bucket.wait_for_weights()
        moved = {bucket for bucket in self._buckets if bucket.absorb_changes()}
        for segment in self.segments:
            if segment.bucket in moved:
                segment.attach()


def _step_tile(work: Work, stepper: StandInStepper, buffer: GradientBuffer) -> None:
    stand_ins: dict[int, list[Tensor]] = {}
    buffer.clear()
    for part in work.parts:
        master = part.segment.master
        master.grad = part.segment.shaped(buffer.put(part.gradient, master.dtype))
        stand_ins.setdefault(part.group, []).append(master)
    buffer.fill()
    stepped = [part.segment for part in work.parts]
    memory = [segment.master.data for segment in stepped]
    stepper.step(stand_ins)
    for segment, own in zip(stepped, memory, strict=True):
        segment.master.grad = None
        if segment.master.data_ptr() != own.data_ptr():
            # Some classes make a new tensor of their weights.
            own.copy_(segment.master.data)
            segment.master.data = own
    rounded = [segment for segment in stepped if segment.bucket.masters is not None]
    if rounded:
        torch._foreach_copy_(
            [segment.weight for segment in rounded], [segment.master.data.view(-1) for segment in rounded]
        )
