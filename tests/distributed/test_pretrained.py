"""Weights of Hugging Face's safetensors: each rank reads its part, and nothing else of them."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ted import from_pretrained
from lightning_ted.adapters import pretrained
from lightning_ted.errors import CheckpointError, UnsupportedError
from tests.support.pool import Pools
from tests.support.runs import assert_close, assert_same_everywhere, trainer, whole_weights

transformers = pytest.importorskip("transformers")

from benchmarks.families import FAMILIES as FAMILIES_OPTIONS  # noqa: E402
from benchmarks.families import build  # noqa: E402
from tests.distributed.test_huggingface import Language  # noqa: E402

#: Files that have experts one by one, files that have them together, tied embeddings, correction buffers, other conversions.
FAMILIES = ["mixtral", "gpt_oss", "ernie4_5_moe", "deepseek_v3", "nemotron_h", "phimoe"]
LAYOUTS = ["tp2 ep2", "ep4", "tp2 ep4 etp1", "tp2"]


class Pretrained(L.LightningModule):
    def __init__(self, folder: str, early: bool = False, **options: Any) -> None:
        super().__init__()
        self.folder, self.options = folder, options
        self.model: Any = None
        if early:
            self.configure_model()

    def configure_model(self) -> None:
        if self.model is None:
            self.model = from_pretrained(transformers.AutoModelForCausalLM, self.folder, **self.options)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        pass


class Whole(Pretrained):
    """As users write it, with the library's own loading."""

    def configure_model(self) -> None:
        if self.model is None:
            self.model = transformers.AutoModelForCausalLM.from_pretrained(self.folder, **self.options).train()


class _Counting:
    """A slice of a file that counts what is read of it."""

    def __init__(self, inner: Any, counts: dict[str, int], name: str) -> None:
        self.inner, self.counts, self.name = inner, counts, name

    def get_shape(self) -> list[int]:
        return self.inner.get_shape()

    def __getitem__(self, index: Any) -> Tensor:
        found = self.inner[index]
        self.counts[self.name] = self.counts.get(self.name, 0) + found.numel()
        return found


def _load(
    layout: str, folder: str, early: bool = False, dtype: torch.dtype | str = "auto"
) -> tuple[dict[str, Tensor], int, int]:
    """Whole weights; elements that this rank has read; elements that it holds."""
    counts: dict[str, int] = {}
    plain = pretrained.slices_of

    @contextmanager
    def counting(files: list[Path]) -> Iterator[dict[str, Any]]:
        with plain(files) as slices:
            yield {name: _Counting(inner, counts, name) for name, inner in slices.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "slices_of", counting)
        run = trainer(layout)
        run.test(Pretrained(folder, early, dtype=dtype), [0], verbose=False)
    model = run.lightning_module.model
    held = {id(t): t.numel() for t in model.state_dict(keep_vars=True).values()}
    return whole_weights(run), sum(counts.values()), sum(held.values())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    found = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        build(family).save_pretrained(folder, max_shard_size="20KB")
        found[family] = str(folder)
    return found


def _load_all(folders: dict[str, str], layout: str) -> dict[str, tuple[dict[str, Tensor], int, int]]:
    return {family: _load(layout, folder) for family, folder in folders.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_rank_reads_its_part_alone(pools: Pools, folders: dict[str, str], layout: str) -> None:
    results = pools(4).run(_load_all, folders, layout, timeout=120)
    for family, folder in folders.items():
        whole = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for weights, read, held in (found[family] for found in results):
            assert {name.removeprefix("model.") for name in weights if name.startswith("model.")} == set(whole)
            for name, tensor in whole.items():
                assert torch.equal(weights[f"model.{name}"], tensor), f"{family}: {name}"
            assert read == held, family


def _fit(layout: str, batch_size: int, folder: str, kind: type[Pretrained], early: bool) -> dict[str, Tensor]:
    run = trainer(layout, max_epochs=1)
    data = torch.randint(3, 64, (8, 8), generator=torch.Generator().manual_seed(1))
    run.fit(kind(folder, early), DataLoader(data, batch_size=batch_size))  # type: ignore[arg-type]
    return whole_weights(run)


@pytest.mark.parametrize("early", [True, False], ids=["__init__", "configure_model"])
def test_training_goes_on_from_them(pools: Pools, folders: dict[str, str], early: bool) -> None:
    ted = pools(4).run(_fit, "tp2 ep2", 2, folders["mixtral"], Pretrained, early)
    assert_same_everywhere(ted)
    assert_close(ted[0], pools(2).run(_fit, "ddp", 2, folders["mixtral"], Whole, early)[0], 1e-5)


def test_weights_are_converted_to_another_dtype(pools: Pools, folders: dict[str, str]) -> None:
    folder = folders["mixtral"]
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    for weights, *_ in pools(2).run(_load, "tp2", folder, False, torch.bfloat16):
        assert all(torch.equal(weights[f"model.{name}"], tensor) for name, tensor in whole.items())


# -- files that do not fit -------------------------------------------------------------------------------------------------


def _changed(folder: str, into: Path, change: Callable[[dict[str, Tensor]], object], **entries: Any) -> str:
    """A copy with other tensors, in one file, and other entries of the configuration."""
    tensors = {}
    for file in Path(folder).glob("*.safetensors"):
        tensors.update(load_file(file))
    change(tensors)
    save_file(tensors, into / "model.safetensors", {"format": "pt"})
    config = json.loads((Path(folder) / "config.json").read_text())
    (into / "config.json").write_text(json.dumps({**config, **entries}))
    return str(into)


def _told(folder: str) -> tuple[list[str], str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            _load("tp2 ep2", folder)
        except CheckpointError as error:
            return [], str(error)
    return [str(warning.message) for warning in caught], ""


def test_what_is_missing_begins_anew_and_is_told(pools: Pools, folders: dict[str, str], tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["lm_head.weight"], tensors["model.layers.1.self_attn.q_proj.weight"]
        tensors["extra.weight"] = torch.ones(2)

    folder = _changed(folders["mixtral"], tmp_path, change)
    (messages, error), *others = pools(4).run(_told, folder)
    assert not error and not any(message for _, message in others)
    missing = "has no weights for: lm_head.weight, model.layers.1.self_attn.q_proj.weight. They begin anew."
    assert any(missing in message for message in messages)
    assert any("MixtralForCausalLM has no use for these weights: extra.weight" in message for message in messages)


def test_other_shapes_are_an_error_of_every_rank(pools: Pools, folders: dict[str, str], tmp_path: Path) -> None:
    folder = _changed(folders["mixtral"], tmp_path, lambda tensors: None, hidden_size=64, head_dim=8)
    for _, error in pools(4).run(_told, folder):
        assert f"The weights in '{folder}' do not fit MixtralForCausalLM: " in error


def test_a_missing_expert_is_an_error_of_every_rank(pools: Pools, folders: dict[str, str], tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for leaf in ("w1", "w3"):
            for number in (0, 1):
                del tensors[f"model.layers.0.block_sparse_moe.experts.{number}.{leaf}.weight"]

    folder = _changed(folders["mixtral"], tmp_path, change)
    for _, error in pools(4).run(_told, folder):
        assert f"'{folder}' has only a part of 'model.layers.0.mlp.experts.gate_up_proj'" in error


def test_a_damaged_file_is_an_error_of_every_rank(pools: Pools, folders: dict[str, str], tmp_path: Path) -> None:
    folder = _changed(folders["mixtral"], tmp_path, lambda tensors: None)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    for _, error in pools(4).run(_told, folder):
        assert f"'{file}' cannot be read as safetensors" in error


def test_folders_of_something_else_are_refused_at_once(folders: dict[str, str], tmp_path: Path) -> None:
    load = partial(from_pretrained, transformers.AutoModelForCausalLM)
    with pytest.raises(CheckpointError, match="is no local folder of a model"):
        load("some/model")
    with pytest.raises(TypeError, match="`dtype='banana'` must be"):
        load(folders["mixtral"], dtype="banana")
    with pytest.raises(TypeError, match="MixtralConfig has no entry 'hidden'"):
        load(folders["mixtral"], hidden=3)
    shutil.copy(Path(folders["mixtral"]) / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="holds 0 files of safetensors"):
        load(tmp_path)
    folder = _changed(folders["mixtral"], tmp_path, lambda _: None, quantization_config={"quant_method": "fp8"})
    with pytest.raises(UnsupportedError, match="are quantized"):
        load(folder)


# -- without files ---------------------------------------------------------------------------------------------------------


class Untrained(Language):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        pass


def _begun(layout: str, kind: str) -> dict[str, Tensor]:
    run = trainer(layout)
    with run.init_module(empty_init=True):
        module = Untrained(kind, **FAMILIES_OPTIONS[kind])
    assert all(parameter.is_meta for parameter in module.parameters())
    run.test(module, [0], verbose=False)
    module.model.eval()(input_ids=torch.arange(8).view(1, 8))  # buffers that are not saved have their values, too
    return whole_weights(run)


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3"])
def test_models_without_storage_begin_as_the_library_would_have_them(pools: Pools, kind: str) -> None:
    found = pools(4).run(_begun, "tp2 ep2", kind)
    assert_same_everywhere(found)
    plain = Language(kind, **FAMILIES_OPTIONS[kind]).state_dict()
    for name, tensor in found[0].items():
        if plain[name].std() == 0:
            assert torch.equal(tensor, plain[name]), name
        else:
            assert 0.5 < tensor.std() / plain[name].std() < 2, name
