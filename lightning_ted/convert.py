"""The command that writes a checkpoint anew in another form, tensor by tensor: ``lightning-ted convert``.

What one form has and another has not got is made where it can be: names of parameters of their numbers, whole tensors of boxes.
Tensors are read into files that have no name, from which they are written; so host memory need not hold them.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from rich.filesize import decimal
from torch import Tensor

from lightning_ted.adapters.export import PretrainedExport
from lightning_ted.checkpoint import directory, distributed, shards, stacked
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
from lightning_ted.checkpoint.opened import checks_of, open_checkpoint
from lightning_ted.checkpoint.portions import Portion
from lightning_ted.checkpoint.single_file import write_file
from lightning_ted.checkpoint.transfer import Reader
from lightning_ted.errors import CheckpointError
from lightning_ted.progress import Bars, size_of

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_FILES = (".ckpt", ".pt", ".pth")


def convert(
    source: str,
    out: str,
    to: Literal["directory", "file", "safetensors", "huggingface"] | None = None,
    dtype: Literal["fp32", "bf16"] | None = None,
    weights_only: bool = False,
    max_shard_size: str = "5GB",
    model_name: str | None = None,
    config_from: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint in another form: a directory, one file, safetensors, or a model of Hugging Face's transformers.

    Args:
        source: A checkpoint: a directory, a ``.ckpt`` file, a ``.safetensors`` file or a folder of them.
        out: Where to write.
        to: The form to write: a directory for any layout, one file for any strategy, safetensors, or a folder that
            ``from_pretrained`` of Hugging Face's transformers reads. Without it, the name OUT decides: ``.ckpt``, ``.pt`` and
            ``.pth`` are one file, ``.safetensors`` is one file of safetensors, and anything else a directory. Under another
            name, ``safetensors`` writes a folder, in files that are named as Hugging Face's libraries do.
        dtype: What floating-point weights and buffers become. Without it, they stay as they are. States of optimizers and
            averages that callbacks keep always do.
        weights_only: Leave out the states of optimizers, schedulers, callbacks and random generators. Safetensors never
            hold them.
        max_shard_size: How large a file of a folder of safetensors may be, such as 500MB or 5GB.
        model_name: Of ``--to huggingface``: under which attribute the LightningModule holds the model, if it holds several.
        config_from: Of ``--to huggingface``: a folder with the model's config.json, if the checkpoint does not tell it.
        overwrite: Replace the checkpoint OUT, once the new one has been written.

    Raises:
        CheckpointError: If the source is missing, damaged or something else, OUT exists or cannot be written, or OUT cannot
            hold what the source does.

    """
    path, final = directory.restored(Path(source)), Path(out)
    form = to or _form_of_name(final)
    limit = shards.bytes_of(max_shard_size)
    _require_place(path, final, form, overwrite)
    weights_only = weights_only or form in ("safetensors", "huggingface")
    if form != "huggingface" and (model_name or config_from):
        raise CheckpointError("`--model-name` and `--config-from` go with `--to huggingface`.")
    with Bars() as bars:
        _verify(path, not weights_only, bars)
        opened = open_checkpoint(path)
        reader = Reader(
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
            elif form == "safetensors":
                _write_safetensors(reader, final, limit)
            else:
                _write_pretrained(reader, final, limit, model_name, config_from)
        except OSError as error:
            raise CheckpointError(
                f"'{final}' could not be written ({error.strerror or error}); nothing has been changed."
            ) from error
    kind = {"directory": "a checkpoint directory", "file": "one file"}.get(form, "safetensors")
    print(f"'{final}' has been written: {kind}, {decimal(size_of(final))}.")


def _form_of_name(path: Path) -> Literal["directory", "file", "safetensors"]:
    if path.suffix == shards.SUFFIX:
        return "safetensors"
    return "file" if path.suffix in _FILES else "directory"


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


# -- writing -----------------------------------------------------------------------------------------------------------------


def _write_directory(reader: Reader, final: Path) -> None:
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


def _write_one_file(reader: Reader, final: Path) -> None:
    opened, tensors = reader.opened, reader.read_all()
    own: dict[str, Any] = {"tensor": 1, "ranks": [], **opened.ranks, "info": dict(opened.info), "optimizers": []}
    state = dict(opened.state)
    described, stored = state.pop(STATE_DICT), state.pop(OPTIMIZER_STATES, None)
    checkpoint = restore_rest(state, lambda name, _: tensors[EXTRA][name])
    weights = restore_state_dict(described, tensors.get(MODEL, {}))
    checkpoint[STATE_DICT] = stacked.with_single(opened.info.get(stacked.INFO) or {}, weights)
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


def _write_safetensors(reader: Reader, final: Path, limit: int) -> None:
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


def _write_pretrained(reader: Reader, final: Path, limit: int, name: str | None, config: str | None) -> None:
    export = PretrainedExport(reader, name, config)
    folder = directory.begin(final)
    try:
        export.finish(folder, export.write(folder, export.units(), limit))
        directory.publish(folder, final)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
