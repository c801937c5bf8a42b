"""When gradients are reduced: while backward still runs, in one order on all ranks.

The gradient of a parameter is summed over the ranks that saw different tokens for the same element, and divided by the
data-parallel degree, expert or not: an expert receives rows from many ranks, but each of their losses is a mean over
one data rank's batch (DeepSpeed-MoE, arXiv 2201.05596: "reduced over expert-data, divided by data").

Note [One order]
    Ranks must start their reductions in the same order, or they wait for each other for ever; so a bucket is started only
    when all before it have been. A bucket that no gradient completes would hold up all behind it. The first pass therefore
    starts nothing early; it looks when each bucket is complete on the slowest rank, and from then on this is the order. Those
    that were complete are always sent, and before anything else at the end of a pass: a rank that misses a gradient cannot
    know whether another has sent the bucket long ago. Then come the others, if there is something in them.

Note [Which gradients are there]
    A parameter that no rank has a gradient for must not be stepped, one that some rank has must be stepped everywhere. So
    presence is summed too, in one small collective, which is read on the host only by ranks that miss a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_ted.collectives.phase import during
from lightning_ted.collectives.primitives import start_all_reduce_, wait
from lightning_ted.errors import UnsupportedError
from lightning_ted.layout import Family, ParamLayout
from lightning_ted.mesh import TEDMesh
from lightning_ted.optim.audit import ReplicaAudit
from lightning_ted.optim.buckets import Bucket
from lightning_ted.optim.host import device_numbers
from lightning_ted.optim.local_bucket import LocalBucket
from lightning_ted.optim.placement import place_in_order, place_whole
from lightning_ted.optim.shared_bucket import SharedBucket
from lightning_ted.topology import AxisName

#: Over which axis a family's gradients are summed.
FAMILY_AXES: dict[Family, AxisName] = {"dense": "data", "partial": "world", "expert": "expert_data"}
#: Elements of one bucket, at most and at least. In between, so that a kind of parameters has about so many buckets: the
#: reduction of one starts when its last gradient has come, and what comes before that cannot be hidden behind backward.
BUCKET_SIZE, _SMALL_BUCKET, _BUCKETS = 2**23, 2**18, 8
#: Reductions that run at the same time, which each need memory to receive in.
_IN_FLIGHT = 4
#: The place in the order of a bucket that no gradient completed.
_LAST = 2**30


class GradientReducer:
    """Reduces the gradients of the parameters that it has adopted.

    Between :meth:`begin_pass` and :meth:`end_pass`, a backward pass; every rank runs the same passes.

    Args:
        mesh: The mesh.
        layouts: Qualified parameter name to layout.
        expert_duplicates: How many times every token reaches its expert: more than once where tensor ranks dispatch the
            same tokens to an expert that is not cut over them.
        zero_stage: 1 keeps gradients of full shape, 2 only this rank's shard of them.
        wide_gradients: Accumulate and reduce the gradients of 16-bit weights in fp32.

    Attributes:
        audit: Compares the gradients of replicated parameters in the first passes.
        passes: How many times gradients have been reduced.
        sent_early: Bytes of gradients in buckets whose reduction was started while the last pass's backward still ran.
        sent: Bytes of gradients in all of its buckets.

    """

    def __init__(
        self,
        mesh: TEDMesh,
        layouts: Mapping[str, ParamLayout],
        expert_duplicates: int = 1,
        zero_stage: int = 1,
        wide_gradients: bool = False,
    ) -> None:
        self._mesh = mesh
        self._layouts = layouts
        self._expert_duplicates = expert_duplicates
        self._frees = zero_stage > 1
        self._wide = wide_gradients
        self.audit = ReplicaAudit(mesh, layouts)
        self._buckets: list[Bucket] = []
        self._names: dict[int, str] = {}
        self._hooks: list[Any] = []
        self._blocked = False
        self._completed: dict[SharedBucket, int] = {}  # once it has been looked at
        self._active: list[Bucket] = []
        self._order: list[SharedBucket] = []
        self._next = 0
        self._learning = False
        self._regular = 0  # so many of the order have been seen complete
        self._in_pass = False
        self._arrivals = 0
        self._last_arrival: dict[Bucket, int] = {}
        self._in_flight: list[SharedBucket] = []
        self.passes = 0
        self.sent_early = self.sent = 0

    def adopt(
        self,
        named_parameters: Sequence[tuple[str, Parameter]],
        working: Mapping[str, torch.dtype],
        whole: bool,
        offload: bool = False,
    ) -> list[Bucket]:
        """Put parameters that are stepped together into buckets, and listen for their gradients.

        Args:
            named_parameters: The parameters.
            working: 16-bit dtype of the weights to compute with, by name, where masters are kept in 32 bits.
            whole: Leave each parameter whole, on one rank.
            offload: Keep masters in host memory.

        Raises:
            UnsupportedError: For a parameter that has been adopted, or is complex.

        """
        again = [name for name, parameter in named_parameters if id(parameter) in self._names]
        if again:
            raise UnsupportedError(
                f"'{again[0]}' is held by two optimizers, but each parameter is shared out once. Give it to one of them."
            )
        for name, parameter in named_parameters:
            if parameter.is_complex() and self._mesh.topology.world_size > 1:
                raise UnsupportedError(
                    f"'{name}' is complex, and gradients of complex parameters cannot be summed over ranks. Keep its real and "
                    "imaginary part as two parameters (`torch.view_as_complex`)."
                )
        kinds: dict[tuple[Family, torch.dtype | None, torch.dtype, torch.device], list[tuple[str, Parameter]]] = {}
        # The reverse of the order of definition is about the order in which gradients come.
        for name, parameter in reversed(named_parameters):
            kind = self._layouts[name].family, working.get(name), parameter.dtype, parameter.device
            kinds.setdefault(kind, []).append((name, parameter))
        made = []
        for (family, dtype, _, _), members in kinds.items():
            for chunk in [members] if whole else _chunks(members):
                made.append(self._make_bucket(family, [parameter for _, parameter in chunk], dtype, whole, offload))
                for index, (name, parameter) in enumerate(chunk):
                    self._names[id(parameter)] = name
                    hook = partial(self._on_gradient, made[-1], index)
                    self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))
        self._buckets += made
        self.audit.expect_more()
        return made

    def _make_bucket(
        self, family: Family, parameters: list[Parameter], working: torch.dtype | None, whole: bool, offload: bool
    ) -> Bucket:
        axis = self._mesh.gradient_axis(FAMILY_AXES[family])
        divisor = self._mesh.topology.data * (self._expert_duplicates if family == "expert" else 1)
        sizes = [parameter.numel() for parameter in parameters]
        placement = (place_whole if whole else place_in_order)(sizes, axis.size)
        dtype = parameters[0].dtype if working is None else working
        grad_dtype = torch.promote_types(dtype, torch.float32) if self._wide else dtype
        kind = LocalBucket if axis.size == 1 else SharedBucket
        bucket = kind(parameters, placement, axis, divisor, working, grad_dtype, offload, self._frees)
        bucket.acquire()
        return bucket

    def share_of(self, bucket: Bucket, index: int) -> float:
        """One over the number of ranks that own the same elements of a parameter."""
        return bucket.axis.size / self._layouts[self._names[id(bucket.parameters[index])]].replication

    def layout_of(self, name: str) -> ParamLayout:
        """How a parameter is cut."""
        return self._layouts[name]

    def name_of(self, parameter: Parameter) -> str:
        """The qualified name of an adopted parameter."""
        return self._names[id(parameter)]

    def close(self) -> None:
        """Listen no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @contextmanager
    def blocked(self) -> Iterator[None]:
        """Passes within the context accumulate locally."""
        before, self._blocked = self._blocked, True
        try:
            yield
        finally:
            self._blocked = before

    # -- a pass --------------------------------------------------------------------------------------------------------

    def begin_pass(self) -> None:
        """To be called before backward."""
        self._finish_all()  # of a pass that was broken off
        self._active = [bucket for bucket in self._buckets if bucket.is_active]
        shared = [bucket for bucket in self._active if isinstance(bucket, SharedBucket)]
        self._order = sorted(shared, key=lambda bucket: self._completed.get(bucket, 0))
        self._next = 0
        self._learning = any(bucket not in self._completed for bucket in shared)
        complete = [bucket for bucket in shared if self._completed.get(bucket, _LAST) < _LAST]
        self._regular = 0 if self._learning else len(complete)
        self._in_pass = not self._blocked
        self._arrivals = 0
        self._last_arrival.clear()
        self.sent_early = self.sent = 0
        for bucket in self._active:
            bucket.begin_pass()

    def _on_gradient(self, bucket: Bucket, index: int, parameter: Parameter) -> None:
        if bucket.started:
            raise UnsupportedError(
                f"'{self._names[id(parameter)]}' got another gradient after its gradients had been sent to be summed. HINT: "
                "checkpoint activations with `use_reentrant=False`, and call `backward` once in a pass."
            )
        bucket.take(index)
        if not self._in_pass:
            return
        self._arrivals += 1
        self._last_arrival[bucket] = self._arrivals
        name = self._names[id(parameter)]
        if self.audit.wants(name):
            self.audit.look(name, parameter)
        while self._next < self._regular and not self._order[self._next].missing:
            self.sent_early += self._start(self._order[self._next])
            self._next += 1

    @during("backward")
    def _start(self, bucket: SharedBucket) -> int:
        if len(self._in_flight) >= _IN_FLIGHT:
            self._in_flight.pop(0).finish_reducing()
        sent = bucket.start_reducing()
        self._in_flight.append(bucket)
        self.sent += sent
        return sent

    @during("backward")
    def end_pass(self) -> None:
        """To be called after backward: whatever has not been reduced is, unless passes accumulate.

        Raises:
            PlanError: In the first passes, if tensor ranks disagree on the gradient of a replicated parameter.

        """
        if not self._in_pass:
            return
        self._in_pass = False
        for bucket in self._order[self._next : self._regular]:
            self._start(bucket)
        if self.audit.is_pending:
            trained = (p for bucket in self._active for p in bucket.parameters if p.requires_grad)
            self.audit.compare({self.name_of(parameter): parameter for parameter in trained})
        presence = _Presence(self._mesh, self._order, [self._completion(bucket) for bucket in self._order])
        for bucket in self._order[self._regular :]:
            if any(presence.local[bucket]) or any(presence.everywhere(bucket)):
                self._start(bucket)
        self._finish_all()
        for bucket in self._order:
            present = presence.everywhere(bucket)
            if bucket.started:
                bucket.publish(present)
            else:
                bucket.skip()
            bucket.started = False
            if not any(present):
                self._completed[bucket] = _LAST  # from now on, sent only if there is something in it
        if self._learning:
            self._completed.update(presence.completed())
        presence.close()
        for local in self._active:
            if isinstance(local, LocalBucket):
                local.reduce()
        self.passes += 1

    def _finish_all(self) -> None:
        for bucket in self._in_flight:
            bucket.finish_reducing()
        self._in_flight.clear()

    def _completion(self, bucket: SharedBucket) -> int:
        """When a bucket was complete; only if each gradient has come once, so that no more were to be expected."""
        once = all(count == 1 for count, p in zip(bucket.arrived, bucket.parameters, strict=True) if p.requires_grad)
        return self._last_arrival[bucket] if once else _LAST


class _Presence:
    """Which gradients there are, on this rank and anywhere; and when buckets were complete.

    Args:
        mesh: The mesh.
        buckets: The buckets of a pass.
        completed: When each was complete on this rank.

    """

    def __init__(self, mesh: TEDMesh, buckets: Sequence[SharedBucket], completed: Sequence[int]) -> None:
        self._buckets = buckets
        self.local = {bucket: [bucket.has_gradient(i) for i in range(len(bucket.parameters))] for bucket in buckets}
        flags = [int(there) for bucket in buckets for there in self.local[bucket]]
        flags += completed
        world = mesh.axis("world")
        self._sent: Tensor | None = None
        self._read: list[int] | None = None
        if buckets:
            self._sent = start_all_reduce_(device_numbers(flags, torch.int32, buckets[0].device), world, "max")

    def everywhere(self, bucket: SharedBucket) -> list[bool]:
        """Of which parameters of a bucket some rank has a gradient."""
        local = self.local[bucket]
        if all(local):
            return local
        start = sum(len(self.local[before]) for before in self._buckets[: self._buckets.index(bucket)])
        return [bool(flag) for flag in self._values()[start : start + len(local)]]

    def completed(self) -> dict[SharedBucket, int]:
        """When each bucket was complete on the slowest rank."""
        return dict(zip(self._buckets, self._values()[-len(self._buckets) :], strict=True))

    def _values(self) -> list[int]:
        if self._read is None:
            assert self._sent is not None
            self._read = wait(self._sent).tolist()
        return self._read

    def close(self) -> None:
        """Wait for the collective, whose result need not be wanted."""
        if self._sent is not None and self._read is None:
            wait(self._sent)


def _chunks(members: list[tuple[str, Parameter]]) -> Iterator[list[tuple[str, Parameter]]]:
    """In order, in chunks of about the same number of elements."""
    size = min(BUCKET_SIZE, max(_SMALL_BUCKET, sum(parameter.numel() for _, parameter in members) // _BUCKETS))
    chunk: list[tuple[str, Parameter]] = []
    filled = 0
    for name, parameter in members:
        chunk.append((name, parameter))
        filled += parameter.numel()
        if filled >= size:
            yield chunk
            chunk, filled = [], 0
    if chunk:
        yield chunk
