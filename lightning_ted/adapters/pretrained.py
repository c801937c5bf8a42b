"""Weights of Hugging Face's safetensors, of which each rank reads its part alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lightning_ted.adapters.peft import plain_name, without_adapters
from lightning_ted.checkpoint import shards
from lightning_ted.checkpoint.boxes import Box, placed
from lightning_ted.checkpoint.distributed import agreed, everybodys
from lightning_ted.errors import CheckpointError, UnsupportedError
from lightning_ted.layout import Cut, ParamLayout
from lightning_ted.mesh import TEDMesh

#: Under which attribute a model keeps the folder of its weights until these are read.
_PENDING = "_ted_pretrained"
#: Operations of the library's conversions that stack what the files have for each expert: a part of their result is made of parts.
_STACKING = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])

Cuts = Mapping[str, tuple[Cut, ...]]


def from_pretrained(model_class: Any, path: str | Path, **options: Any) -> Any:
    """A model of transformers without storage, whose weights are read when ``TEDStrategy`` has shared it out.

    To be called in ``__init__`` or ``configure_model`` of a LightningModule, in the place of ``model_class.from_pretrained(path)``,
    which reads all weights in every process.

    Args:
        model_class: ``AutoModelForCausalLM``, another of the library's auto classes, or a class of models.
        path: A local folder with ``config.json`` and safetensors, in one file or several.
        **options: Entries of the configuration to change, and ``dtype`` of the weights (as they were saved by default).

    Returns:
        The model, in training mode; its parameters are on the meta device.

    Raises:
        CheckpointError: If there are no such files.
        UnsupportedError: If the weights are quantized.

    """
    from transformers import AutoConfig, GenerationConfig

    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"'{path}' is no local folder of a model: it holds no config.json.")
    for file in shards.files_of(folder):
        if not file.is_file():
            raise CheckpointError(f"There is no '{file}'. Only safetensors are read.")
    dtype = options.pop("dtype", "auto")
    config, unknown = AutoConfig.from_pretrained(folder, return_unused_kwargs=True, **options)
    if unknown:
        raise TypeError(f"{type(config).__name__} has no entry '{min(unknown)}'.")
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedError(f"The weights in '{path}' are quantized, and cannot be trained; dequantize them first.")
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise TypeError(f"`dtype={dtype!r}` must be one of torch's floating-point dtypes, or 'auto'.")
    dtype = (config.dtype or torch.float32) if dtype == "auto" else dtype
    make = getattr(model_class, "from_config", None) or model_class._from_config
    with torch.device("meta"):
        model = make(config, dtype=dtype)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.__dict__[_PENDING] = folder
    return model


def load_pretrained(
    root: nn.Module, cuts: Cuts, mesh: TEDMesh, device: torch.device | None
) -> dict[int, tuple[int, ...]]:
    """Read this rank's parts of what :func:`from_pretrained` has left to be read. A collective where there is any.

    Args:
        root: The module.
        cuts: How its parameters are to be cut, by qualified name.
        mesh: The mesh.
        device: Where the parts are to live; None for the CPU.

    Returns:
        Of each tensor that has been read (by its ``id``), the shape of the whole one. What the files lack stays on the meta device.

    Raises:
        CheckpointError: On every rank, if a file is damaged, or does not fit the model.

    """
    whole: dict[int, tuple[int, ...]] = {}
    for name, model in list(root.named_modules()):
        folder: Path | None = model.__dict__.pop(_PENDING, None)
        if folder is not None:
            prefix = f"{name}." if name else ""
            below = {plain_name(key.removeprefix(prefix)): cut for key, cut in cuts.items() if key.startswith(prefix)}
            with without_adapters(model):  # under the names that the files have
                reading = _Reading(model, below, mesh, device or torch.device("cpu"))
                whole |= agreed(partial(reading.read, folder), mesh.host_group())
            missing = everybodys(reading.missing, mesh.host_group())
            counts = Counter(name for own in missing for name in own)
            uneven = sorted(name for name, ranks in counts.items() if ranks < len(missing))
            if uneven:
                raise CheckpointError(f"'{folder}' has only a part of '{uneven[0]}': some of its experts are missing.")
    return whole


class _Reading:
    """One model's weights on their way."""

    def __init__(self, model: Any, cuts: Cuts, mesh: TEDMesh, device: torch.device) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        self._model, self._device = model, device
        #: Of what the files have nothing, once they have been read.
        self.missing: list[str] = []
        self._index = {name: mesh.axis(name).rank for name in ("tensor", "expert", "expert_tensor")}
        self._mapping: list[Any] = get_model_conversion_mapping(model)
        self._before = dict(model.named_parameters(remove_duplicate=False))
        self._layouts: dict[str, ParamLayout] = {}
        for name, parameter in self._before.items():
            layout = ParamLayout(name, tuple(parameter.shape), tuple(c for c in cuts.get(name, ()) if c.degree > 1))
            if layout.cuts:
                self._layouts[name] = layout
        #: Those that the library makes of parts of what is in the files.
        self._parts = {name: at for name, at in self._layouts.items() if not _is_converted_whole(at, self._mapping)}

    def read(self, folder: Path) -> dict[int, tuple[int, ...]]:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        dtype = next(iter(self._before.values())).dtype
        config = LoadStateDictConfig(device_map={"": self._device}, dtype=dtype, weight_mapping=self._mapping)
        try:
            for name, layout in self._parts.items():
                was = self._before[name]
                part = torch.empty(layout.local_shape, dtype=was.dtype, device="meta")
                _set(self._model, name, nn.Parameter(part, was.requires_grad))
            with slices_of(shards.files_of(folder)) as slices:
                found, _ = convert_and_load_state_dict_in_model(self._model, self._cut(slices), config)
            read = self._take()
        finally:
            for name, parameter in self._before.items():
                _set(self._model, name, parameter)
        self._report(found, folder)
        return read

    def _cut(self, slices: dict[str, Any]) -> dict[str, Any]:
        """What the library is to read: of each tensor of the files what belongs to this rank's part of a parameter."""
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        prefix, known = self._model.base_model_prefix, self._model.state_dict()
        wanted: dict[str, Any] = {}
        numbers: Counter[tuple[str, str | None]] = Counter()
        for key in sorted(slices, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, known)
            if name not in known and key in known:
                name, pattern = key, None
            layout = self._parts.get(name)
            if layout is None:
                wanted[key] = slices[key]
            elif len(slices[key].get_shape()) == len(layout.global_shape):
                wanted[key] = _Part(slices[key], layout, self._index)
            else:
                number = numbers[name, pattern]
                numbers[name, pattern] += 1
                part = self._part_of_expert(slices[key], number, layout)
                if part is not None:
                    wanted[key] = part
        return wanted

    def _part_of_expert(self, stored: Any, number: int, layout: ParamLayout) -> _Part | None:
        """This rank's part of a tensor of one expert, the files' ``number``-th; None if that is elsewhere.

        Of several tensors that are joined to one parameter, each is one of the blocks in which that is cut.
        """
        over = next((cut for cut in layout.cuts if cut.dim == 0), None)
        if over is not None and number % layout.global_shape[0] // layout.local_shape[0] != self._index["expert"]:
            return None
        shape = tuple(stored.get_shape())
        inner = tuple(replace(c, dim=c.dim - 1, blocks=(shape[c.dim - 1],)) for c in layout.cuts if c.dim > 0)
        return _Part(stored, ParamLayout(layout.name, shape, inner), self._index)

    def _take(self) -> dict[int, tuple[int, ...]]:
        """Give the parameters what has been read; they stay the same objects, tied ones too."""
        read: dict[int, tuple[int, ...]] = {}
        for name, parameter in self._before.items():
            part, whole = _get(self._model, name).detach(), tuple(parameter.shape)
            if part.is_meta or id(parameter) in read:
                continue
            if name in self._layouts and name not in self._parts:
                part = _Part(part, self._layouts[name], self._index)[...].clone()
            torch.utils.swap_tensors(parameter, nn.Parameter(part, parameter.requires_grad))
            read[id(parameter)] = whole
        return read | {id(buffer): tuple(buffer.shape) for buffer in self._model.buffers() if not buffer.is_meta}

    def _report(self, found: Any, folder: Path) -> None:
        problems = [f"{name}: {reason}" for name, reason in found.conversion_errors.items()]
        problems += [
            f"'{name}' has the shape {tuple(there)} there and {tuple(here)} in the model"
            for name, there, here in found.mismatched_keys
        ]
        if problems or found.error_msgs:
            raise CheckpointError(
                f"The weights in '{folder}' do not fit {type(self._model).__name__}: {[*problems, *found.error_msgs][0]}."
            )
        self.missing = missing = sorted(name for name in found.missing_keys if _get(self._model, name).is_meta)
        if missing:
            rank_zero_warn(f"'{folder}' has no weights for: {', '.join(missing)}. They begin anew.")
        ignored = self._model._keys_to_ignore_on_load_unexpected or ()
        extra = sorted(key for key in found.unexpected_keys if not any(re.search(p, key) for p in ignored))
        if extra:
            rank_zero_warn(f"{type(self._model).__name__} has no use for these weights: {', '.join(extra)}.")


@dataclass(frozen=True)
class _Part:
    """This rank's part of a tensor, read when it is asked for.

    Attributes:
        stored: What can be indexed by slices of each dimension.
        layout: How it is cut.
        index: This rank's position on each axis.

    """

    stored: Any
    layout: ParamLayout
    index: Mapping[str, int]

    def __getitem__(self, everything: object) -> Tensor:
        found = [
            (within, self.stored[_slices(box)])
            for within, box in placed(Box.whole(self.layout.local_shape), self.layout, self.index)
        ]
        if len(found) == 1:
            return found[0][1]
        part = found[0][1].new_empty(self.layout.local_shape)
        for within, tensor in found:
            part[_slices(within)] = tensor
        return part


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(offset, offset + size) for offset, size in zip(box.offsets, box.sizes, strict=True))


@contextmanager
def slices_of(files: list[Path]) -> Iterator[dict[str, Any]]:
    """The tensors of safetensors by name, to be read by indexing.

    Raises:
        CheckpointError: If a file is damaged.

    """
    opened, slices = [], {}
    try:
        for file in files:
            try:
                opened.append(reader := safe_open(file, framework="pt").__enter__())
                slices.update({name: reader.get_slice(name) for name in reader.keys()})  # noqa: SIM118
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(f"'{file}' cannot be read as safetensors ({error}).") from error
        yield slices
    finally:
        for reader in opened:
            reader.__exit__(None, None, None)


def _is_converted_whole(layout: ParamLayout, mapping: list[Any]) -> bool:
    """Whether the library makes a parameter of the files' tensors in a way that has to see them whole."""
    for conversion in mapping:
        operations = [type(operation).__name__ for operation in getattr(conversion, "operations", ())]
        if not operations or not any(_is_named(layout.name, pattern) for pattern in conversion.target_patterns):
            continue
        joined = len(conversion.source_patterns) if "Concatenate" in operations else 1
        by_dim = {cut.dim: len(cut.blocks) for cut in layout.cuts}
        if operations not in _STACKING or by_dim.get(1, joined) != joined:
            return True
    return False


def _is_named(name: str, pattern: str) -> bool:
    """Whether a conversion's target may be this parameter; where in doubt, it is."""
    return re.search(re.sub(r"\\\d+", ".+", pattern).replace("*.", r".*\."), name) is not None


def _get(model: nn.Module, name: str) -> Tensor:
    parent, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(parent), leaf)


def _set(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(parent).register_parameter(leaf, parameter)
