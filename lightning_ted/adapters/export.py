"""Checkpoints written as Hugging Face's transformers write their models: what ``from_pretrained`` reads.

A layer at a time is read and converted back to the library's names, so no process ever holds the model; several processes can
write a part of the layers each.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_ted.adapters.huggingface import named_models
from lightning_ted.adapters.peft import adapted_models
from lightning_ted.checkpoint import directory, shards
from lightning_ted.checkpoint.contents import MODEL, STATE_DICT, Contents
from lightning_ted.checkpoint.distributed import Group, agreed, by_first, everybodys, write
from lightning_ted.checkpoint.opened import open_checkpoint
from lightning_ted.checkpoint.portions import shared_out
from lightning_ted.checkpoint.transfer import Reader
from lightning_ted.errors import CheckpointError
from lightning_ted.progress import Bars

#: Under which key a checkpoint tells of the library's models in it.
INFO = "huggingface"
_LAYER = re.compile(r"(.*?\.\d+)\.")


def described_models(root: nn.Module) -> list[dict[str, Any]]:
    """What a checkpoint has to tell of the library's models in a module, so that they can be exported."""
    adapted = adapted_models(root)
    inside = tuple(f"{name}." if name else "" for name in adapted)
    return [{"name": name, "class": type(model).__name__, "adapters": True} for name, model in adapted.items()] + [
        {
            "name": name,
            "class": type(model).__name__,
            "config": json.loads(model.config.to_json_string()),
            "generation_config": json.loads(generation.to_json_string())
            if (generation := getattr(model, "generation_config", None)) is not None
            else None,
        }
        for name, model in named_models(root)
        if not name.startswith(inside)
    ]


@dataclass(frozen=True)
class Written:
    """One file of a model.

    Attributes:
        name: In its folder.
        tensors: Whose names it holds.
        size: Bytes of these.

    """

    name: str
    tensors: tuple[str, ...]
    size: int


class PretrainedExport:
    """One of the library's models in a checkpoint, on its way into a folder.

    Args:
        reader: Reads the checkpoint.
        name: Under which attribute the LightningModule holds the model; None if it holds but one.
        config_from: A folder with its configuration; None if the checkpoint tells it.

    Raises:
        CheckpointError: If the checkpoint does not tell of such a model, or lacks some of its weights, or has others.

    """

    def __init__(self, reader: Reader, name: str | None = None, config_from: str | None = None) -> None:
        self._reader = reader
        described = self._described(name, config_from)
        self._described_model = described
        with torch.device("meta"):
            self._model = _empty_model(described)
        prefix = f"{described['name']}." if described["name"] else ""
        aliases: Mapping[str, str] = reader.opened.state[STATE_DICT]["aliases"]
        stored = reader.sizes(MODEL)
        here = {key.removeprefix(prefix) for key in (*stored, *aliases) if key.startswith(prefix)}
        self._names = self._match(here)
        # By the model's names, where in the checkpoint each is.
        self._stored = {key: aliases.get(f"{prefix}{key}", f"{prefix}{key}") for key in self._names}
        self._sizes = {key: stored[where] for key, where in self._stored.items()}

    def _described(self, name: str | None, config_from: str | None) -> dict[str, Any]:
        known: list[dict[str, Any]] = list(self._reader.opened.info.get(INFO) or ())
        if config_from is not None:
            folder = Path(config_from)
            try:
                config = json.loads((folder / "config.json").read_bytes())
                kind = config["architectures"][0]
            except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
                raise CheckpointError(
                    f"`--config-from {config_from}` holds no config.json that names a model ({error})."
                ) from error
            return {"name": name if name is not None else "model", "class": kind, "config": config}
        chosen = [model for model in known if name is None or model["name"] == name]
        if len(chosen) == 1:
            if chosen[0].get("adapters"):
                raise CheckpointError(
                    f"The checkpoint's model '{chosen[0]['name']}' has adapters of peft. `HuggingFaceExport` and "
                    "`strategy.save_pretrained` write them in a run, from which peft merges them into a model."
                )
            return chosen[0]
        names = ", ".join(f"'{model['name']}'" for model in known)
        if not known:
            raise CheckpointError(
                "The checkpoint does not tell of a model of Hugging Face's transformers; name a folder that holds its config.json "
                "with `--config-from`."
            )
        raise CheckpointError(
            f"The checkpoint holds the models {names}; choose one of them by `model_name` (`--model-name`)."
        )

    def _match(self, here: set[str]) -> list[str]:
        model = self._model
        kind, tied = type(model).__name__, set(model.all_tied_weights_keys)
        wanted = [name for name in model.state_dict() if name not in tied]
        missing, extra = sorted(set(wanted) - here), sorted(here - set(wanted) - tied)
        if missing or extra:
            told = f"lacks '{missing[0]}'" if missing else f"holds '{extra[0]}', of which that knows nothing"
            raise CheckpointError(f"The checkpoint holds no {kind} as it is: it {told}.")
        return wanted

    def units(self) -> dict[str, int]:
        """What can be written by itself: the layers and the rest, with their bytes."""
        sizes: dict[str, int] = {}
        for name in self._names:
            unit = _unit_of(name)
            sizes[unit] = sizes.get(unit, 0) + self._sizes[name]
        return sizes

    def write(self, folder: Path, units: Iterable[str], limit: int, first: str = "") -> list[Written]:
        """Write some units into files.

        Args:
            folder: Where.
            units: Which.
            limit: Bytes of each file; a larger unit of tensors is split.
            first: What the names of the files begin with.

        Returns:
            The files.

        """
        files: list[Written] = []
        held: dict[str, Tensor] = {}

        def flush() -> None:
            if held:
                name = f"{first}{len(files):05d}.part"
                shards.write_shard(folder / name, held, {}, {})
                files.append(Written(name, tuple(held), sum(tensor.nbytes for tensor in held.values())))
                held.clear()

        for unit in units:
            for name, tensor in self._converted(unit).items():
                if held and sum(other.nbytes for other in held.values()) + tensor.nbytes > limit:
                    flush()
                held[name] = tensor
        flush()
        return files

    def _converted(self, unit: str) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        names = [name for name in self._names if _unit_of(name) == unit]
        read = self._reader.read(MODEL, {self._stored[name] for name in names}, anew=True)
        converted = revert_weight_conversion(self._model, {name: read[self._stored[name]] for name in names})
        # Parts of a tensor share its memory, which is a file's: each is written by itself.
        return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in converted.items()}

    def finish(self, folder: Path, files: list[Written]) -> None:
        """Give the files their names, and write the index and the configuration.

        Args:
            folder: Where the files are.
            files: All of them, in order.

        """
        from transformers import GenerationConfig

        weight_map: dict[str, str] = {}
        for number, file in enumerate(files, 1):
            name = shards.name_of(number, len(files))
            (folder / file.name).rename(folder / name)
            weight_map.update(dict.fromkeys(file.tensors, name))
        if len(files) > 1:
            shards.write_index(folder, weight_map, sum(file.size for file in files))
        model = self._model
        dtypes = {self._reader.dtype_of(MODEL, stored) for stored in self._stored.values()}
        floating = sorted((dtype for dtype in dtypes if dtype.is_floating_point), key=lambda dtype: -dtype.itemsize)
        model.config.dtype = str(floating[0]).removeprefix("torch.") if floating else None
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        generation = self._described_model.get("generation_config")
        if generation is not None:
            GenerationConfig.from_dict(generation).save_pretrained(folder)


def write_pretrained(
    contents: Contents, final: Path, group: Group, name: str | None, dtype: torch.dtype | None, limit: int
) -> None:
    """Write a model out of a run, each rank some of its layers. A collective.

    Args:
        contents: A checkpoint of the weights.
        final: Where.
        group: All ranks.
        name: Under which attribute the LightningModule holds the model; None if it holds but one.
        dtype: Of floating-point weights; None leaves them.
        limit: Bytes of each file.

    Raises:
        CheckpointError: On every rank, if it could not be written. What was there before is then as it was.

    """
    world, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    folder = by_first(lambda: directory.begin(final), group)
    weights = folder / "weights"
    try:
        write(contents, weights, group)
        export = agreed(
            lambda: PretrainedExport(Reader(open_checkpoint(weights), dtype, folder, Bars()), name),
            group,
        )
        units = export.units()
        mine = shared_out(units, range(world), rank)
        files = agreed(
            lambda: export.write(folder, [unit for unit in units if unit in mine], limit, f"{rank:05d}-"), group
        )
        written = [file for own in everybodys(files, group) for file in own]

        def finish() -> None:
            shutil.rmtree(weights)
            export.finish(folder, written)
            directory.publish(folder, final)

        by_first(finish, group)
    finally:
        by_first(lambda: shutil.rmtree(folder, ignore_errors=True), group)


def write_adapters(model: Any, weights: Mapping[str, Tensor], final: Path, group: Group) -> None:
    """Write the adapters of a model as peft does, for ``PeftModel.from_pretrained``. A collective.

    Args:
        model: The model with its adapters.
        weights: Whole ones of the adapters, under their names in the model; on the first rank.
        final: Where.
        group: All ranks.

    Raises:
        CheckpointError: On every rank, if they could not be written. What was there before is then as it was.

    """

    def write() -> None:
        folder = directory.begin(final)
        try:
            model.save_pretrained(str(folder), state_dict=dict(weights), save_embedding_layers=False)
            directory.publish(folder, final)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    by_first(write, group)


def _unit_of(name: str) -> str:
    found = _LAYER.match(name)
    return found[1] if found else ""


def _empty_model(described: Mapping[str, Any]) -> Any:
    """The model that a checkpoint tells of, on the meta device if that is the default."""
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError(
            'A model of Hugging Face\'s transformers is written with that library: pip install "lightning-ted[huggingface]".'
        ) from error
    kind = described["class"]
    model_class = getattr(transformers, kind, None)
    if model_class is None:
        raise CheckpointError(f"transformers {transformers.__version__} has no {kind}, which the checkpoint holds.")
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        # As a file, because the library has its own way to write what JSON has no word for.
        json.dump(described["config"], file)
        file.flush()
        return model_class(model_class.config_class.from_json_file(file.name))
