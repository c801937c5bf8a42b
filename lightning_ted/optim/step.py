"""The step over this rank's share of the parameters, tile by tile (TED, arXiv 2303.06318, section 4).

A tile's gradients are turned into the masters' dtype, scaled and clipped in one buffer that all tiles use; so beside the
state itself, a step needs the memory of one tile, however large the share is.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Adam, AdamW, Optimizer

from lightning_ted.collectives.primitives import all_gather_rows
from lightning_ted.errors import UnsupportedError
from lightning_ted.mesh import TEDMesh
from lightning_ted.optim.buckets import Bucket
from lightning_ted.optim.gradient_buffer import GradientBuffer
from lightning_ted.optim.norm import clip_coefficient, global_norm
from lightning_ted.optim.offload import HostStore
from lightning_ted.optim.reducer import GradientReducer
from lightning_ted.optim.segments import Segment, Work, cut_into_tiles
from lightning_ted.optim.stand_ins import StandInStepper, Update
from lightning_ted.optim.state import load_pieces


@dataclass(frozen=True)
class StepOptions:
    """How an optimizer steps.

    Attributes:
        tile_size: Elements of a tile; None steps all at once.
        whole: Whether it has to see whole parameters.
        working: 16-bit dtype of the weights to compute with, by name, where masters are kept in 32 bits.
        offload: Keep masters, and the optimizer's state of each element, in host memory.
        overlap: Return from a step while updated weights are still on their way; somebody else waits for them.

    """

    tile_size: int | None = 2**24
    whole: bool = False
    working: Mapping[str, torch.dtype] = field(default_factory=dict)
    offload: bool = False
    overlap: bool = False


class ShardedStep:
    """This rank's share of an optimizer's parameters, and the step over it.

    Args:
        optimizer: The optimizer.
        names: Of all parameters that it may ever hold, the qualified name.
        reducer: Reduces their gradients.
        mesh: The mesh.
        device: Where collectives take place.
        options: How it steps.

    Attributes:
        optimizer: The optimizer.
        steps: How many steps have been made.

    """

    def __init__(
        self,
        optimizer: Optimizer,
        names: Mapping[Parameter, str],
        reducer: GradientReducer,
        mesh: TEDMesh,
        device: torch.device,
        options: StepOptions,
    ) -> None:
        self.optimizer = optimizer
        self._names = names
        self._reducer = reducer
        self._mesh = mesh
        self._device = device
        self._options = options
        self._buckets: list[Bucket] = []
        self._tiles: list[list[Segment]] = []
        self._places: dict[Parameter, tuple[Bucket, int]] = {}
        self._store = HostStore(optimizer, device) if options.offload else None
        # By what gradients are to be multiplied as they are read.
        self._scale: Tensor | None = None
        self._norm: tuple[tuple[int, ...], Tensor] | None = None
        self.steps = 0
        self.adopt()

    @property
    def segments(self) -> list[Segment]:
        """What this rank steps, in order."""
        return [segment for tile in self._tiles for segment in tile]

    def owned_elements(self) -> dict[Parameter, int]:
        """Of how many elements this rank steps, of each parameter that is shared out."""
        counts = dict.fromkeys(self.parameters, 0)
        for segment in self.segments:
            counts[segment.parameter] += segment.size
        return counts

    @property
    def parameters(self) -> Iterable[Parameter]:
        """What it steps, all ranks together."""
        return self._places.keys()

    def new_parameters(self) -> list[Parameter]:
        """Those that have come to the optimizer, or been unfrozen, since :meth:`adopt` was last called."""
        return [
            parameter
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            if parameter.requires_grad and parameter not in self._places
        ]

    def adopt(self) -> None:
        """Share out the parameters that are new.

        Raises:
            UnsupportedError: For a parameter that the model does not know; for one that is cut, if the optimizer has to see whole
                ones.

        """
        new = self.new_parameters()
        if not new:
            return
        unknown = [parameter for parameter in new if parameter not in self._names]
        if unknown:
            raise UnsupportedError(
                f"`{type(self.optimizer).__name__}` holds a parameter of shape {tuple(unknown[0].shape)} that was made after "
                "the parameters had been placed on the ranks, so its gradients would not be averaged. Make it in `__init__`, "
                "`configure_model` or `setup`."
            )
        # In the order of definition, which is the same on all ranks and about the reverse of that of the gradients.
        wanted = set(new)
        self._refuse_parts(wanted)
        named = [(name, parameter) for parameter, name in self._names.items() if parameter in wanted]
        options = self._options
        # Stepped in the order of definition, which is about the order in which the next forward wants the weights.
        buckets = self._reducer.adopt(named, options.working, options.whole, options.offload)[::-1]
        tiles = cut_into_tiles(buckets, options.tile_size, options.whole)
        self._buckets += buckets
        self._tiles += tiles
        self._places.update((p, (bucket, index)) for bucket in buckets for index, p in enumerate(bucket.parameters))
        # What the optimizer has set up for whole parameters, such as Adagrad's initial sums.
        state = self.optimizer.state
        found = {parameter: state.pop(parameter) for parameter in new if parameter in state}
        load_pieces(state, found, [segment for tile in tiles for segment in tile], wanted)

    def _refuse_parts(self, parameters: Collection[Parameter]) -> None:
        names = (self._names[parameter] for parameter in parameters)
        cut = [name for name in names if self._reducer.layout_of(name).cuts]
        if self._options.whole and cut:
            raise UnsupportedError(
                f"`{type(self.optimizer).__name__}` cannot step '{min(cut)}', of which each rank holds a part: its update mixes "
                "the elements of a parameter. Use an elementwise optimizer, such as `AdamW` or `SGD`, for what is cut at least: "
                "`configure_optimizers` may return several."
            )

    def counted_on_device(self) -> set[Parameter]:
        """The parameters whose count of steps the optimizer reads on their device."""
        groups = [group for group in self.optimizer.param_groups if group.get("fused") or group.get("capturable")]
        groups += _fused_groups(self.optimizer, self._device)
        return {parameter for group in groups for parameter in group["params"]}

    # -- weights -------------------------------------------------------------------------------------------------------

    @property
    def buckets(self) -> Sequence[Bucket]:
        """The buckets, in the order in which their weights return."""
        return self._buckets

    def acquire(self) -> None:
        """Make 16-bit working weights, and masters of what they were."""
        for bucket in self._buckets:
            bucket.acquire()
        for segment in self.segments:
            segment.attach()

    def release(self) -> None:
        """Give the parameters back in their own dtype. A collective."""
        for bucket in self._buckets:
            bucket.release()
        for segment in self.segments:
            segment.attach()

    @torch.no_grad()
    def update_masters(self, weights: Mapping[str, Tensor] | None = None) -> None:
        """Let masters be what ``weights`` has for a name, this rank's part; None: the working weights, where they differ."""
        for bucket in self._buckets:
            if weights is None:
                bucket.follow_weights()
            else:
                bucket.update_masters([weights.get(self._names[parameter]) for parameter in bucket.parameters])

    # -- gradients -----------------------------------------------------------------------------------------------------

    def forget_gradients(self, set_to_none: bool = True) -> None:
        """Drop the gradients of this rank's share, or make them zero."""
        self._scale = None
        for bucket in self._buckets:
            if set_to_none:
                bucket.drop_gradients()
            else:
                bucket.zero_gradients()

    @property
    def has_unreduced(self) -> bool:
        """Whether some gradients have not been reduced."""
        return any(bucket.pending for bucket in self._buckets)

    def _require_reduced(self, what: str) -> None:
        if self.has_unreduced and self._mesh.topology.world_size > 1:
            raise UnsupportedError(
                f"The {what} is known once gradients have been averaged over the ranks, and not between backward passes that "
                "accumulate. Ask for it in `on_before_optimizer_step`; in manual optimization, after a pass that synchronises."
            )

    def _gradients(self) -> list[tuple[Tensor, float]]:
        pairs = [
            (bucket.gradient_of(piece), self._reducer.share_of(bucket, piece.index))
            for bucket in self._buckets
            for piece in bucket.pieces
        ]
        return [(gradient, share) for gradient, share in pairs if gradient is not None]

    def grad_norm(self) -> Tensor:
        """The 2-norm of this optimizer's whole gradient, as one process would have it: unscaled, and not clipped unless it has
        been. 0-dim, float64, the same on every rank.

        Every rank has to call it. It is computed once for the same gradients, whoever asks.

        Raises:
            UnsupportedError: If there are gradients that have not been averaged over the ranks.

        """
        self._require_reduced("norm")
        version = tuple(number for bucket in self._buckets for number in bucket.gradient_version())
        if self._norm is None or self._norm[0] != (self._reducer.passes, *version):
            gradients = self._gradients()
            norm = global_norm([g for g, _ in gradients], [share for _, share in gradients], self._mesh, self._device)
            self._norm = ((self._reducer.passes, *version), norm)
        return self._norm[1] if self._scale is None else self._norm[1] * self._scale

    def gather(self, parameter: Parameter, owned: Tensor) -> Tensor:
        """This rank's part of a parameter (or of what belongs to its elements), from what each rank owns of it, ``[owned]``.
        A collective.
        """
        bucket, index = self._places[parameter]
        return all_gather_rows(owned, bucket.placement.counts(index), bucket.axis).view(parameter.shape)

    def gather_master(self, parameter: Parameter) -> Tensor | None:
        """The master weights of this rank's part of a parameter; None if it is its own master. A collective."""
        bucket, index = self._places[parameter]
        if bucket.masters is None:
            return None
        owned = [bucket.master_of(piece) for piece in bucket.pieces if piece.index == index]
        return self.gather(parameter, (owned[0] if owned else bucket.masters[:0]).to(bucket.device))

    @torch.no_grad()
    def local_gradient(self, parameter: Parameter) -> Tensor | None:
        """The reduced gradient of this rank's part of a parameter, put together from all that own some of it; None if it has
        none. Scaled as :meth:`grad_norm`. A collective.

        Raises:
            UnsupportedError: If there are gradients that have not been averaged over the ranks.

        """
        self._require_reduced(f"gradient of '{self._names[parameter]}'")
        bucket, index = self._places[parameter]
        if not bucket.is_present(index):
            return None
        owned = parameter.new_empty(0, dtype=bucket.grad_dtype)
        for piece in (piece for piece in bucket.pieces if piece.index == index):
            gradient = bucket.gradient_of(piece)
            # None if somebody has taken it away on this rank.
            owned = owned.new_zeros(piece.stop - piece.start) if gradient is None else gradient
        full = self.gather(parameter, owned)
        return full if self._scale is None else full.to(torch.promote_types(full.dtype, torch.float32)) * self._scale

    @torch.no_grad()
    def apply_scale(self) -> None:
        """Multiply the gradients by what has been noted, before others are added to them."""
        if self._scale is not None:
            for gradient, _ in self._gradients():
                gradient.mul_(self._scale.to(torch.promote_types(gradient.dtype, torch.float32)))
            self._scale = self._norm = None

    def skip(self) -> None:
        """End a step that is not made, because its gradients have overflowed."""
        self._scale = None
        for bucket in self._buckets:
            bucket.after_step()

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply all gradients by a 0-dim tensor, when they are next read by a step."""
        self._scale = factor.double() if self._scale is None else self._scale * factor

    def clip_by_norm(self, max_norm: float) -> None:
        """Scale the gradients so that their norm is at most ``max_norm``. A collective."""
        self.scale_gradients(clip_coefficient(self.grad_norm(), max_norm))

    @torch.no_grad()
    def clip_by_value(self, limit: float) -> None:
        """Limit each element of the gradients to ``[-limit, limit]``."""
        self._norm = None  # also where this rank owns nothing: the next one is a collective
        for gradient, _ in self._gradients():
            if self._scale is None:
                gradient.clamp_(-limit, limit)
            else:
                bound = (limit / self._scale).to(gradient.dtype)
                gradient.clamp_(-bound, bound)

    # -- the step ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
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
        with _fused_where_possible(self.optimizer, self._device), _without_hooks(self.optimizer):
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
            if not self._options.overlap:
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


@contextmanager
def _without_hooks(optimizer: Optimizer) -> Iterator[None]:
    """A ``step`` that calls that of its base class would run the hooks of a whole step for each tile."""
    names = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    hooks = {name: getattr(optimizer, name) for name in names}
    for name in names:
        setattr(optimizer, name, OrderedDict())
    try:
        yield
    finally:
        for name, own in hooks.items():
            setattr(optimizer, name, own)


@contextmanager
def _fused_where_possible(optimizer: Optimizer, device: torch.device) -> Iterator[None]:
    """Groups that leave the choice of an implementation to torch step fused within the context."""
    chosen = _fused_groups(optimizer, device)
    for group in chosen:
        group["fused"] = True
    try:
        yield
    finally:
        for group in chosen:
            group["fused"] = None


def _fused_groups(optimizer: Optimizer, device: torch.device) -> list[dict[str, Any]]:
    """The groups that may step fused and do not say how they want to step."""
    # Not SGD: fused, the momentum of all parameters has to begin in the same step, and torch's kernel for CPUs leaves 16-bit
    # weights as they are.
    if not isinstance(optimizer, (Adam, AdamW)) or device.type not in ("cpu", "cuda"):
        return []
    return [
        group
        for group in optimizer.param_groups
        if group.get("fused", 0) is group.get("foreach", 0) is None
        and not group.get("differentiable")
        and all(parameter.is_floating_point() for parameter in group["params"])
    ]
