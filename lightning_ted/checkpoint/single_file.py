"""One plain ``.ckpt`` file: parts are joined when it is written and cut again when it is read.

Everything in between, the hooks of modules and callbacks included, sees this rank's parts. So the file is the one that one
process would have written, and any strategy, any layout and ``load_from_checkpoint`` can read it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_ted.checkpoint import directory
from lightning_ted.checkpoint.contents import OPTIMIZER_STATES
from lightning_ted.checkpoint.optimizer_state import Join, gather_state
from lightning_ted.checkpoint.scratch import room_for
from lightning_ted.checkpoint.stream import save_into
from lightning_ted.checkpoint.tree import Names, require_same
from lightning_ted.collectives.whole import gather_whole
from lightning_ted.layout import ParamLayout
from lightning_ted.mesh import TEDMesh
from lightning_ted.optim.sharded import ShardedOptimizer

#: Tensors of fewer bytes than this stay in memory until the file is written.
_SMALL = 2**20


def write_file(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint beside its place, and then put it there.

    Raises:
        CheckpointError: If there is a directory of something else in its place.
        OSError: If it cannot be written; what was there before is as it was.

    """
    written = directory.prepare(path)
    try:
        with written.open("wb") as file:
            save_into(file, checkpoint)
            file.flush()
            os.fsync(file.fileno())
        directory.publish(written, path)
    except BaseException:
        written.unlink(missing_ok=True)
        raise


def _kept(tensor: Tensor, folder: Path | None) -> Tensor:
    """A copy in host memory, or in a nameless file that host memory is free to hold or not."""
    if folder is not None and tensor.nbytes >= _SMALL:
        # Without room the other ranks do not stop here; writing the file will fail on all of them.
        with suppress(OSError):
            return room_for({"": (tuple(tensor.shape), tensor.dtype)}, folder)[""].copy_(tensor)
    return tensor.to("cpu", copy=True)


class SingleFile:
    """The single-file form of one module's checkpoints.

    Args:
        names: How the module's parameters and buffers lie.
        mesh: Where this rank's parts lie.
        device: Where collectives take place.
        folder: Where whole tensors may be set aside until they are written; None to keep them in host memory.

    """

    def __init__(self, names: Names, mesh: TEDMesh, device: torch.device, folder: Path | None = None) -> None:
        self._names = names
        self._mesh = mesh
        self._device = device
        self._folder = folder

    def joined(
        self,
        checkpoint: dict[str, Any],
        optimizers: Sequence[Optimizer],
        keep: bool,
        master_of: Callable[[Tensor], Tensor | None] = lambda _: None,
    ) -> dict[str, Any]:
        """The checkpoint with full tensors, one after the other. A collective: every rank calls it.

        Args:
            checkpoint: This rank's checkpoint, which is not changed.
            optimizers: The optimizers whose states it holds, in order.
            keep: Whether this rank wants the result (the one that writes); others get an incomplete one.
            master_of: This rank's part of the master weights for a tensor that is a working weight, else None. May be a
                collective.

        Raises:
            CheckpointError: On every rank, if the ranks' checkpoints have different keys.

        """
        found: list[str] = []

        def note(path: str, tensor: Tensor, layout: ParamLayout) -> Tensor:
            if tuple(tensor.shape) == layout.local_shape:
                found.append(f"{path} {tuple(tensor.shape)} {tensor.dtype}")
            return tensor

        def join(path: str, tensor: Tensor, layout: ParamLayout) -> Tensor:
            if tuple(tensor.shape) != layout.local_shape:
                return tensor
            master = master_of(tensor)
            return self._join(tensor, layout, keep) if master is None else self._join(master, layout, keep, fresh=True)

        self._names.visit(checkpoint, note, without=(OPTIMIZER_STATES,))
        require_same(found, self._mesh, self._device)
        result = self._names.visit(checkpoint, join, without=(OPTIMIZER_STATES,))
        if OPTIMIZER_STATES in checkpoint:
            result[OPTIMIZER_STATES] = [
                gather_state(optimizer, state, self._join_state(keep), keep)
                if isinstance(optimizer, ShardedOptimizer)
                else state
                for state, optimizer in zip(checkpoint[OPTIMIZER_STATES], optimizers, strict=True)
            ]
        return result

    def _join(self, tensor: Tensor, layout: ParamLayout, keep: bool, fresh: bool = False) -> Tensor:
        """The whole tensor of which this rank has ``tensor``; ``fresh``: which has been made for this."""
        if not layout.cuts:
            # A file would hold all of the memory that a view looks at.
            shares = tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()
            return _kept(tensor, self._folder) if keep and (fresh or shares) else tensor
        full = gather_whole(tensor.detach().to(self._device), layout, self._mesh)
        return _kept(full, self._folder) if keep else tensor

    def _join_state(self, keep: bool) -> Join:
        def join(parameter: Parameter, part: Tensor) -> Tensor | None:
            full = self._join(part, self._names.known(parameter)[1], keep, fresh=True)
            return full if keep else None

        return join

    def cut(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint as read from a file with this rank's parts, but for the optimizers' states.

        Those are cut by :meth:`cut_optimizer_state`, once the optimizers are there.
        """
        return self._names.visit(
            checkpoint, lambda _, tensor, layout: self.part(tensor, layout), without=(OPTIMIZER_STATES,)
        )

    def cut_optimizer_state(self, state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
        """One optimizer's state with this rank's parts."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        indices = [index for group in state.get("param_groups", []) for index in group["params"]]
        layouts = {index: self._names.of(parameter) for index, parameter in zip(indices, parameters, strict=False)}
        result: dict[Any, Any] = {}
        for index, entries in state.get("state", {}).items():
            layout = layouts.get(index)
            if layout is None or not layout.cuts or not isinstance(entries, dict):
                result[index] = entries
                continue
            result[index] = {
                name: self.part(entry, layout) if isinstance(entry, Tensor) else entry
                for name, entry in entries.items()
            }
        return {**state, "state": result} if "state" in state else state

    def part(self, tensor: Tensor, layout: ParamLayout) -> Tensor:
        """This rank's part of a tensor, if it is a whole one."""
        if not layout.cuts or tuple(tensor.shape) != layout.global_shape:
            return tensor
        index: dict[str, int] = {cut.axis: self._mesh.axis(cut.axis).rank for cut in layout.cuts}
        # A copy, as a view would keep the full tensor in memory.
        return layout.part(tensor, index).clone(memory_format=torch.contiguous_format)
