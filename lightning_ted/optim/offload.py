"""Masters and state in host memory, brought to the device for as long as they are stepped (ZeRO-Offload, arXiv 2101.06840).

Note [Three tiles at a time]
    While a tile is stepped, the next one comes and the last one goes, on streams of their own, so that both directions of
    the bus are busy at once. The device has room for three tiles, and a tile is sent for only when the one that was in its
    place has gone. However large the model is, no more of its masters and state is ever there; nor of the state that a
    first step makes.

Note [When the host may look]
    A step returns when its last tile has gone. So between steps what is on the host is right, and anybody may read or
    replace what ``optimizer.state`` holds: a tensor that is not where it was left is taken over by the next step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_ted.optim.host import host_zeros
from lightning_ted.optim.placement import align
from lightning_ted.optim.segments import Segment
from lightning_ted.optim.state import State, is_per_element

#: Target and source.
Copy = tuple[Tensor, Tensor]
_SLOTS = 3


@dataclass(frozen=True)
class Done:
    """When copies are done; ``event``: None if they are."""

    event: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Let the current stream go on only then."""
        if self.event is not None:
            self.event.wait()

    def synchronize(self) -> None:
        """Return only then."""
        if self.event is not None:
            self.event.synchronize()


class Lane:
    """Makes copies one after the other, beside the computation; where there are no streams, at once.

    Args:
        device: From or to which.

    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, copies: Sequence[Copy]) -> Done:
        """Make ``copies`` when what has been computed so far is there."""
        if self._stream is None:
            for target, source in copies:
                target.copy_(source)
            return Done()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            for target, source in copies:
                target.copy_(source, non_blocking=True)
                # Whoever lets go of it, its memory must not be used again before.
                (target if target.is_cuda else source).record_stream(self._stream)
            return Done(self._stream.record_event())


class _Slot:
    """Room for one tile on the device.

    Attributes:
        free: When the tile that was there last has gone.

    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: dict[torch.dtype, Tensor] = {}
        self.free = Done()

    def room_for(self, hosts: Sequence[Tensor]) -> list[Tensor]:
        """Memory for flat tensors of these lengths and dtypes."""
        used: Counter[torch.dtype] = Counter()
        starts = []
        for host in hosts:
            starts.append(used[host.dtype])
            used[host.dtype] += align(host.numel())
        for dtype, count in used.items():
            if dtype not in self._memory or self._memory[dtype].numel() < count:
                self._memory[dtype] = torch.empty(count, dtype=dtype, device=self._device)
        return [self._memory[host.dtype][at : at + host.numel()] for host, at in zip(hosts, starts, strict=True)]


@dataclass(frozen=True)
class _View:
    """A part of a flat tensor.

    Attributes:
        segment: Whose elements it has.
        key: Its name in the optimizer's state; None for masters.
        start: Where it begins in the flat tensor.
        host: It, on the host.

    """

    segment: Segment
    key: str | None
    start: int
    host: Tensor

    def on(self, device: Tensor) -> Tensor:
        """It, in a copy of the flat tensor."""
        return device[self.start : self.start + self.segment.size].view(self.host.shape)


@dataclass(frozen=True)
class _Flat:
    """Consecutive host memory, copied at once, and all that views it."""

    host: Tensor
    views: list[_View]


class _Shelf:
    """The state of some segments of a tile: of each key one flat tensor, which their entries view.

    Args:
        segments: The segments, whose masters are of one dtype, so that their state mostly is, too.

    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._starts = dict(zip(segments, accumulate((segment.size for segment in segments), initial=0), strict=False))
        self._size = sum(segment.size for segment in segments)
        self._memory: dict[tuple[str, torch.dtype], Tensor] = {}
        self._views: dict[tuple[Segment, str], _View] = {}

    def take_over(self, state: State, places: Sequence[str]) -> list[Copy]:
        """Let entries be views that are not yet, of those in ``places``; returns what is to be copied for that."""
        copies = []
        for segment in self._starts:
            own = state.get(segment.master, {})
            for key, value in own.items():
                if _can_move(value, segment) and value.device.type in places and not self._has(segment, key, value):
                    own[key] = self._make_view(segment, key, value)
                    copies.append((own[key], value))
        return copies

    def _has(self, segment: Segment, key: str, value: Tensor) -> bool:
        view = self._views.get((segment, key))
        return view is not None and view.host is value

    def _make_view(self, segment: Segment, key: str, value: Tensor) -> Tensor:
        memory = self._memory.get((key, value.dtype))
        if memory is None:
            memory = self._memory[key, value.dtype] = host_zeros(self._size, value.dtype, segment.bucket.device)
        start = self._starts[segment]
        host = memory[start : start + segment.size].view(value.shape)
        self._views[segment, key] = _View(segment, key, start, host)
        return host

    def flats(self, state: State) -> list[_Flat]:
        """What there is; memory of which ``state`` holds nothing any more is freed."""
        views: dict[tuple[str, torch.dtype], list[_View]] = {name: [] for name in self._memory}
        for (segment, key), view in self._views.items():
            if state.get(segment.master, {}).get(key) is view.host:
                views[key, view.host.dtype].append(view)
        self._memory = {name: memory for name, memory in self._memory.items() if views[name]}
        return [_Flat(memory, views[name]) for name, memory in self._memory.items()]


@dataclass(frozen=True)
class _Visit:
    """A tile on the device.

    Attributes:
        slot: Where it is.
        copies: Its flat tensors, on the host and on the device.
        views: All views of these, and the same on the device.
        arrived: When it is there.

    """

    slot: _Slot
    copies: list[Copy]
    views: list[tuple[_View, Tensor]]
    arrived: Done


class HostStore:
    """Masters and state of each element on the host, which visit the device to be stepped.

    Masters that are the working weights, and what is not of single elements, such as counts of steps, stay where they are.

    Args:
        optimizer: The optimizer.
        device: Where its parameters are.

    """

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self._optimizer = optimizer
        self._device = device
        self._in, self._out = Lane(device), Lane(device)
        self._shelves: dict[Segment, list[_Shelf]] = {}  # by the first segment of a tile

    def visit(self, tiles: Sequence[list[Segment]]) -> Iterator[list[Segment]]:
        """Each tile in turn, on the device while it is the caller's. See Note [Three tiles at a time]."""
        slots = [_Slot(self._device) for _ in range(_SLOTS)]
        coming = [self._fetch(tile, slots[0]) for tile in tiles[:1]]
        for index, tile in enumerate(tiles, 1):
            here = coming.pop()
            coming += [self._fetch(after, slots[index % _SLOTS]) for after in tiles[index : index + 1]]
            self._show(here)
            yield tile
            self._send_back(tile, here)
        for slot in slots:
            slot.free.synchronize()

    def _fetch(self, tile: list[Segment], slot: _Slot) -> _Visit:
        slot.free.synchronize()
        state = self._optimizer.state
        flats = _flats_of_masters(tile)
        for shelf in self._shelves_of(tile):
            for target, source in shelf.take_over(state, ("cpu", self._device.type)):
                target.copy_(source)
            flats += shelf.flats(state)
        devices = slot.room_for([flat.host for flat in flats])
        arrived = self._in.start([(device, flat.host) for flat, device in zip(flats, devices, strict=True)])
        return _Visit(
            slot,
            [(flat.host, device) for flat, device in zip(flats, devices, strict=True)],
            [(view, view.on(device)) for flat, device in zip(flats, devices, strict=True) for view in flat.views],
            arrived,
        )

    def _show(self, visit: _Visit) -> None:
        visit.arrived.wait()
        for view, device in visit.views:
            if view.key is None:
                view.segment.master.data = device
            else:
                self._optimizer.state[view.segment.master][view.key] = device

    def _send_back(self, tile: list[Segment], visit: _Visit) -> None:
        state = self._optimizer.state
        for view, device in visit.views:
            if view.key is None:
                view.segment.attach()
            elif state.get(view.segment.master, {}).get(view.key) is device:
                state[view.segment.master][view.key] = view.host
        # What the optimizer has made or replaced comes last, as the rest has old values in its place.
        new = [copy for shelf in self._shelves_of(tile) for copy in shelf.take_over(state, (self._device.type,))]
        visit.slot.free = self._out.start([*visit.copies, *new])

    def _shelves_of(self, tile: list[Segment]) -> list[_Shelf]:
        if tile[0] not in self._shelves:
            by_dtype: dict[torch.dtype, list[Segment]] = {}
            for segment in tile:
                by_dtype.setdefault(segment.master.dtype, []).append(segment)
            self._shelves[tile[0]] = [_Shelf(segments) for segments in by_dtype.values()]
        return self._shelves[tile[0]]


def _flats_of_masters(tile: list[Segment]) -> list[_Flat]:
    """Runs of masters that are on the host; what lies between the segments in them belongs to nobody."""
    flats = []
    for bucket, members in groupby(tile, lambda segment: segment.bucket):
        if bucket.masters is not None:
            segments = list(members)
            first, last = segments[0].piece, segments[-1].piece
            views = [_View(one, None, one.piece.offset - first.offset, one.master.data) for one in segments]
            flats.append(_Flat(bucket.masters[first.offset : last.offset + last.stop - last.start], views))
    return flats


def _can_move(value: Any, segment: Segment) -> bool:
    # A tensor subclass, such as of quantized numbers, is more than its elements.
    return type(value) is Tensor and is_per_element(value, segment.size)
