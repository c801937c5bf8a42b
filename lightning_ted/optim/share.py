"""What of an optimizer's parameters this rank steps: their masters, gradients and norm."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_ted.collectives.primitives import all_gather_rows
from lightning_ted.errors import UnsupportedError
from lightning_ted.mesh import TEDMesh
from lightning_ted.optim.buckets import Bucket
from lightning_ted.optim.fused import fused_groups
from lightning_ted.optim.norm import clip_coefficient, global_norm
from lightning_ted.optim.offload import HostStore
from lightning_ted.optim.options import TrainingOptions
from lightning_ted.optim.reducer import GradientReducer
from lightning_ted.optim.segments import Segment, cut_into_tiles
from lightning_ted.optim.state import load_pieces


class OptimizerShare:
    """This rank's share of an optimizer's parameters.

    Args:
        optimizer: The optimizer.
        names: Of all parameters that it may ever hold, the qualified name.
        reducer: Reduces their gradients.
        mesh: The mesh.
        device: Where collectives take place.
        options: How it is trained.
        working: 16-bit dtype of the weights to compute with, by name, where masters are kept in 32 bits.
        whole: Whether the optimizer has to see whole parameters.

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
        options: TrainingOptions,
        working: Mapping[str, torch.dtype],
        whole: bool,
    ) -> None:
        self.optimizer = optimizer
        self._names = names
        self._reducer = reducer
        self._mesh = mesh
        self._device = device
        self._options = options
        self._working = working
        self._whole = whole
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

    def adopt(self) -> bool:
        """Share out the parameters that are new; returns whether there were any.

        Raises:
            UnsupportedError: For a parameter that the model does not know; for one that is cut, if the optimizer has to see whole
                ones.

        """
        new = self.new_parameters()
        if not new:
            return False
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
        buckets = self._reducer.adopt(named, self._working, self._whole, options.offload)[::-1]
        tiles = cut_into_tiles(buckets, options.tile_size, self._whole)
        self._buckets += buckets
        self._tiles += tiles
        self._places.update((p, (bucket, index)) for bucket in buckets for index, p in enumerate(bucket.parameters))
        # What the optimizer has set up for whole parameters, such as Adagrad's initial sums.
        state = self.optimizer.state
        found = {parameter: state.pop(parameter) for parameter in new if parameter in state}
        load_pieces(state, found, [segment for tile in tiles for segment in tile], wanted)
        return True

    def _refuse_parts(self, parameters: Collection[Parameter]) -> None:
        names = (self._names[parameter] for parameter in parameters)
        cut = [name for name in names if self._reducer.layout_of(name).cuts]
        if self._whole and cut:
            raise UnsupportedError(
                f"`{type(self.optimizer).__name__}` cannot step '{min(cut)}', of which each rank holds a part: its update mixes "
                "the elements of a parameter. Use an elementwise optimizer, such as `AdamW` or `SGD`, for what is cut at least: "
                "`configure_optimizers` may return several."
            )

    def counted_on_device(self) -> set[Parameter]:
        """The parameters whose count of steps the optimizer reads on their device."""
        groups = [group for group in self.optimizer.param_groups if group.get("fused") or group.get("capturable")]
        groups += fused_groups(self.optimizer, self._device)
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

    def masters_owned(self, parameter: Parameter) -> tuple[Bucket, list[tuple[int, Tensor]]] | None:
        """Of the master weights of this rank's part of a parameter, its bucket, and the ranges that this rank owns: where each
        begins, and its elements, flat. None if it is its own master."""
        bucket, index = self._places[parameter]
        if bucket.masters is None:
            return None
        return bucket, [(piece.start, bucket.master_of(piece)) for piece in bucket.pieces if piece.index == index]

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
            owned = owned.new_zeros(piece.size) if gradient is None else gradient
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
