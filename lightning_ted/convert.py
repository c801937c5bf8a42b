"""The command that writes a checkpoint anew in another form, tensor by tensor: ``lightning-ted convert``.

What one form has and another has not got is made where it can be: names of parameters of their numbers, whole tensors of boxes.
Tensors are read into files that have no name, from which they are written; so host memory need not hold them.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from rich.filesize import decimal
from torch import Tensor

from lightning_ted.checkpoint import directory, distributed, shards
from lightning_ted.checkpoint.contents import (
    EXTRA,
    MODEL,
    OPTIMIZER_STATES,
    OWN,
    STATE_DICT,
    TRAINING,
    Contents,
    restore_rest,
    restore_state_dict,
)
from lightning_ted.checkpoint.numbering import by_number, names_of
from lightning_ted.checkpoint.opened import Opened, checks_of, open_checkpoint
from lightning_ted.checkpoint.portions import Portion
from lightning_ted.checkpoint.scratch import room_for
from lightning_ted.checkpoint.single_file import write_file
from lightning_ted.errors import CheckpointError
from lightning_ted.progress import Bars, size_of

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_FILES = (".ckpt", ".pt", ".pth")
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}

#: Bytes of tensors that are read at a time.
_AT_ONCE = 2**26


def convert(
    source: str,
    out: str,
    to: Literal["directory", "file", "safetensors"] | None = None,
    dtype: Literal["fp32", "bf16"] | None = None,
    weights_only: bool = False,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> None:
    """Write a checkpoint in another form: a directory, one file, or safetensors.

    Args:
        source: A checkpoint: a directory, a ``.ckpt`` file, a ``.safetensors`` file or a folder of them.
        out: Where to write.
        to: The form to write: a directory for any layout, one file for any strategy, or safetensors. Without it, the name
            OUT decides: ``.ckpt``, ``.pt`` and ``.pth`` are one file, ``.safetensors`` is one file of safetensors, and
            anything else a directory. Under another name, ``safetensors`` writes a folder, in files that are named as Hugging
            Face's libraries do.
        dtype: What floating-point weights and buffers become. Without it, they stay as they are. States of optimizers and
            averages that callbacks keep always do.
        weights_only: Leave out the states of optimizers, schedulers, callbacks and random generators. Safetensors never
            hold them.
        max_shard_size: How large a file of a folder of safetensors may be, such as 500MB or 5GB.
        overwrite: Replace the checkpoint OUT, once the new one has been written.

    Raises:
        CheckpointError: If the source is missing, damaged or something else, OUT exists or cannot be written, or OUT cannot
            hold what the source does.

    """
    path, final = directory.restored(Path(source)), Path(out)
    form = to or _form_of_name(final)
    limit = _bytes_of(max_shard_size)
    _require_place(path, final, form, overwrite)
    weights_only = weights_only or form == "safetensors"
    with Bars() as bars:
        _verify(path, not weights_only, bars)
        opened = open_checkpoint(path)
        reader = _Reader(
            opened.without_training() if weights_only else opened,
            _DTYPES.get(dtype or ""),
            final.absolute().parent,
            bars,
        )
        try:
            final.absolute().parent.mkdir(parents=True, exist_ok=True)
            if form == "directory":
                _write_directory(reader, final)
            elif form == "file":
                _write_one_file(reader, final)
            else:
                _write_safetensors(reader, final, limit)
        except OSError as error:
            raise CheckpointError(
                f"'{final}' could not be written ({error.strerror or error}); nothing has been changed."
            ) from error
    kind = {"directory": "a checkpoint directory", "file": "one file", "safetensors": "safetensors"}[form]
    print(f"'{final}' has been written: {kind}, {decimal(size_of(final))}.")


def _form_of_name(path: Path) -> Literal["directory", "file", "safetensors"]:
    if path.suffix == shards.SUFFIX:
        return "safetensors"
    return "file" if path.suffix in _FILES else "directory"


def _bytes_of(size: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?b)?", size.strip(), re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise CheckpointError(f"`--max-shard-size {size}` is no size of a file; write it as 500MB, 5GB or 2GiB.")
    return int(float(found[1]) * _UNITS[(found[2] or "").lower()])


def _require_place(source: Path, out: Path, form: str, overwrite: bool) -> None:
    here, there = source.resolve(), out.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise CheckpointError(f"'{out}' and '{source}' are, or contain, each other. Choose another place for OUT.")
    if form == "file" and out.suffix == shards.SUFFIX:
        raise CheckpointError(f"'{out}' would not be recognised as one file of `--to file`; let its name end in .ckpt.")
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise CheckpointError(f"'{out}' exists. Choose another name, or replace it with `--overwrite`.")
    directory.require_replaceable(out)


def _verify(path: Path, training: bool, bars: Bars) -> None:
    checks = checks_of(path, training)
    with bars.step("comparing checksums", sum(check.size for check in checks)) as advance:
        for check in checks:
            check.run()
            advance(check.size)


# -- reading -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reader:
    """Reads tensors onto disk.

    Attributes:
        opened: What is read.
        dtype: Of floating-point weights; None leaves them.
        folder: On whose file system there is room.
        bars: Tell how far it is.

    """

    opened: Opened
    dtype: torch.dtype | None
    folder: Path
    bars: Bars

    def dtype_of(self, part: str, name: str) -> torch.dtype:
        """That a tensor is to have."""
        dtype = self.opened.parts[part].dtypes[name]
        return self.dtype if part == MODEL and self.dtype is not None and dtype.is_floating_point else dtype

    def sizes(self, part: str) -> dict[str, int]:
        """Bytes of each tensor of a part, as it will be."""
        shapes = self.opened.parts[part].shapes if part in self.opened.parts else {}
        return {
            name: torch.Size(shapes[name]).numel() * self.dtype_of(part, name).itemsize
            for name in self.opened.names(part)
        }

    def read(self, part: str, names: Iterable[str], anew: bool = False) -> dict[str, Tensor]:
        """Tensors whose memory is in files: those of the checkpoint, if they lie there as they are to be, or new ones.

        Args:
            part: Of which part.
            names: Which.
            anew: Whether each is to have memory of its own.

        """
        if part not in self.opened.parts:
            return {}
        source = self.opened.parts[part]
        held: dict[str, Tensor] = {}
        wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name in names:
            tensor = None if anew or self.dtype_of(part, name) != source.dtypes[name] else source.held(name)
            if tensor is not None:
                held[name] = tensor
            else:
                wanted[name] = source.shapes[name], self.dtype_of(part, name)
        made = room_for(wanted, self.folder)
        with self.bars.step(f"reading {part}", sum(tensor.nbytes for tensor in made.values())) as advance:
            for batch in _batches(made):
                source.fill(batch)
                advance(sum(tensor.nbytes for tensor in batch.values()))
        return {**held, **made}

    def read_all(self) -> dict[str, dict[str, Tensor]]:
        """All parts."""
        return {part: self.read(part, self.opened.names(part)) for part in self.opened.parts}


def _batches(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    batch: dict[str, Tensor] = {}
    held = 0
    for name, tensor in tensors.items():
        if batch and held + tensor.nbytes > _AT_ONCE:
            yield batch
            batch, held = {}, 0
        batch[name] = tensor
        held += tensor.nbytes
    if batch:
        yield batch


# -- writing -----------------------------------------------------------------------------------------------------------------


def _write_directory(reader: _Reader, final: Path) -> None:
    opened = reader.opened
    if opened.unnamed_optimizers():
        raise CheckpointError(
            "The file holds the states of optimizers by the numbers of parameters, and does not tell which parameters these are. "
            "Convert the weights alone with `--weights-only`; or resume from the file with `TEDStrategy`, which reads it as it is, "
            "and save there."
        )
    tensors = {
        part: {name: Portion.whole(tensor) for name, tensor in found.items()}
        for part, found in reader.read_all().items()
        if found
    }
    total = sum(portion.nbytes for portions in tensors.values() for portion in portions.values())
    with reader.bars.watching("writing", directory.incomplete(final), total):
        distributed.write(Contents(tensors, opened.state, dict(opened.ranks), dict(opened.info)), final, None)


def _write_one_file(reader: _Reader, final: Path) -> None:
    opened, tensors = reader.opened, reader.read_all()
    own: dict[str, Any] = {"tensor": 1, "ranks": [], **opened.ranks, "info": dict(opened.info), "optimizers": []}
    state = dict(opened.state)
    described, stored = state.pop(STATE_DICT), state.pop(OPTIMIZER_STATES, None)
    checkpoint = restore_rest(state, lambda name, _: tensors[EXTRA][name])
    checkpoint[STATE_DICT] = restore_state_dict(described, tensors.get(MODEL, {}))
    if stored is not None:
        checkpoint[OPTIMIZER_STATES] = [
            by_number(index, saved, tensors.get(TRAINING, {})) if "class" in saved else saved
            for index, saved in enumerate(stored)
        ]
        own["optimizers"] = [
            {"class": saved.get("class", "Optimizer"), "parameters": names_of(saved) if "class" in saved else None}
            for saved in stored
        ]
    checkpoint[OWN] = own
    total = sum(tensor.nbytes for found in tensors.values() for tensor in found.values())
    with reader.bars.watching("writing", directory.incomplete(final), total):
        write_file(checkpoint, final)


def _write_safetensors(reader: _Reader, final: Path, limit: int) -> None:
    described, sizes = reader.opened.state[STATE_DICT], reader.sizes(MODEL)
    if described["others"]:
        rank_zero_warn(f"Safetensors hold tensors alone, and so not: {', '.join(sorted(described['others']))}.")
    one_file = final.suffix == shards.SUFFIX
    plan = [list(sizes)] if one_file else shards.plan_shards(sizes, limit)

    def tensors_of(names: list[str]) -> dict[str, Tensor]:
        return reader.read(MODEL, names, anew=True)

    folder = directory.begin(final)
    try:
        shards.write_shards(folder, plan, tensors_of, described["aliases"], reader.opened.info)
        directory.publish(next(folder.iterdir()) if one_file else folder, final)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
