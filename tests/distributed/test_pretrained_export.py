"""Models of Hugging Face that leave a run: what ``from_pretrained`` reads is what has been trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ted.adapters.export import INFO
from lightning_ted.callbacks import HuggingFaceExport
from lightning_ted.convert import convert
from lightning_ted.errors import CheckpointError, TEDError
from tests.support.pool import Pools
from tests.support.runs import Toy, loader, trainer, whole_weights

transformers = pytest.importorskip("transformers")

from benchmarks.families import build  # noqa: E402

#: Experts one by one in files, fused in files, tied embeddings, correction buffers, other names in files.
FAMILIES = ["mixtral", "gpt_oss", "ernie4_5_moe", "deepseek_v3", "nemotron_h", "granitemoe"]


class Language(L.LightningModule):
    def __init__(self, kind: str, several: bool = False) -> None:
        super().__init__()
        self.model = build(kind)
        self.teacher = build("olmoe").requires_grad_(False) if several else None

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _fit(layout: str, module: L.LightningModule, **options: Any) -> L.Trainer:
    data = torch.randint(3, 64, (8, 8), generator=torch.Generator().manual_seed(1))
    run = trainer(layout, **{"max_epochs": 1, **options})
    run.fit(module, DataLoader(data, batch_size=2))  # type: ignore[arg-type]
    return run


def _export_all(layout: str, folder: Path) -> dict[str, dict[str, Tensor]]:
    found = {}
    for kind in FAMILIES:
        export = HuggingFaceExport(folder / kind, max_shard_size="20KB")
        run = _fit(layout, Language(kind), callbacks=[export])
        run.save_checkpoint(folder / f"{kind}.ckpt")
        found[kind] = whole_weights(run)
    return found


def _assert_same(folder: Path, weights: dict[str, Tensor]) -> None:
    model, told = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    read = model.state_dict()
    for name, tensor in weights.items():
        assert torch.equal(read[name.removeprefix("model.")], tensor), name


@pytest.mark.parametrize(("world", "layout"), [(4, "tp2 ep2"), (2, "ep2")])
def test_what_is_written_is_what_has_been_trained(pools: Pools, tmp_path: Path, world: int, layout: str) -> None:
    weights = pools(world).run(_export_all, layout, tmp_path, timeout=120)[0]
    for kind, trained in weights.items():
        _assert_same(tmp_path / kind, trained)
        assert not (tmp_path / kind / "weights").exists()
        index = json.loads((tmp_path / kind / "model.safetensors.index.json").read_text())
        assert {path.name for path in (tmp_path / kind).glob("*.safetensors")} == set(index["weight_map"].values())
        # Out of a checkpoint, by the command.
        convert(str(tmp_path / f"{kind}.ckpt"), str(tmp_path / "out" / kind), to="huggingface")
        _assert_same(tmp_path / "out" / kind, trained)
        assert (tmp_path / "out" / kind / "model.safetensors").exists()
    mine = (tmp_path / "mixtral" / "model.safetensors.index.json").read_text()
    assert "model.layers.0.mlp.experts.3.w1.weight" in mine or "block_sparse_moe.experts.3.w1.weight" in mine


def _checkpoint(folder: Path) -> dict[str, Tensor]:
    run = _fit("tp2 file", Language("mixtral"))
    run.save_checkpoint(folder / "file.ckpt")
    run = _fit("tp2", Language("mixtral", several=True))
    run.save_checkpoint(folder / "two.ckpt")
    return whole_weights(run)


def test_the_command_writes_what_is_asked_for(pools: Pools, tmp_path: Path) -> None:
    weights = pools(2).run(_checkpoint, tmp_path)[0]
    file, two = str(tmp_path / "file.ckpt"), str(tmp_path / "two.ckpt")
    convert(file, str(tmp_path / "a"), to="huggingface", dtype="bf16")
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert read.dtype == torch.bfloat16
    student = {name: t for name, t in weights.items() if name.startswith("model.")}
    assert all(torch.equal(read.state_dict()[name[6:]], t.bfloat16()) for name, t in student.items())
    # Of several models, one is named; and a folder tells what a checkpoint of another strategy does not.
    with pytest.raises(CheckpointError, match="holds the models 'model', 'teacher'; choose one of them"):
        convert(two, str(tmp_path / "b"), to="huggingface")
    convert(two, str(tmp_path / "b"), to="huggingface", model_name="teacher")
    teacher = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert type(teacher).__name__ == "OlmoeForCausalLM"
    plain = torch.load(file, weights_only=True)
    del plain["lightning_ted"]["info"][INFO]
    torch.save(plain, tmp_path / "plain.ckpt")
    with pytest.raises(CheckpointError, match="does not tell of a model of Hugging Face's transformers"):
        convert(str(tmp_path / "plain.ckpt"), str(tmp_path / "c"), to="huggingface")
    convert(str(tmp_path / "plain.ckpt"), str(tmp_path / "c"), to="huggingface", config_from=str(tmp_path / "a"))
    _assert_same(tmp_path / "c", student)
    # What is not there is said, and nothing is written.
    with pytest.raises(CheckpointError, match="holds no OlmoeForCausalLM as it is: it lacks 'model.layers.0"):
        convert(file, str(tmp_path / "d"), to="huggingface", config_from=str(tmp_path / "b"))
    with pytest.raises(CheckpointError, match="holds no config.json that names a model"):
        convert(file, str(tmp_path / "d"), to="huggingface", config_from=str(tmp_path))
    with pytest.raises(CheckpointError, match="go with `--to huggingface`"):
        convert(file, str(tmp_path / "d"), to="safetensors", model_name="model")
    assert not (tmp_path / "d").exists()


def _refusals(folder: Path) -> list[str]:
    found = []
    for module, layout, name in (
        (Toy(), "tp2", None),
        (Language("mixtral"), "tp2", "x"),
        (Language("mixtral"), "ddp", None),
    ):
        try:
            run = trainer(layout, callbacks=[HuggingFaceExport(folder / "y", model_name=name)], max_epochs=1)
            run.fit(module, loader())
        except TEDError as error:
            found.append(str(error))
    if dist.get_rank() == 0:
        (folder / "z").mkdir()
        (folder / "z" / "notes.txt").touch()
    dist.barrier()
    run = _fit("tp2", Language("mixtral"))
    try:
        run.strategy.save_pretrained(folder / "z")  # type: ignore[attr-defined]
    except CheckpointError as error:
        found.append(str(error))
    run.strategy.save_pretrained(folder / "later")  # type: ignore[attr-defined]
    return found


def test_what_cannot_be_written_is_refused(pools: Pools, tmp_path: Path) -> None:
    for found in pools(2).run(_refusals, tmp_path):
        assert "fits no model of Toy, which holds none of transformers" in found[0]
        assert "`HuggingFaceExport(model_name='x')` fits no model of Language, which holds 'model'" in found[1]
        assert "needs `Trainer(strategy=TEDStrategy(...))`" in found[2]
        assert f"'{tmp_path}/z' is a directory of something else" in found[3]
    assert [path.name for path in (tmp_path / "z").iterdir()] == ["notes.txt"]
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "later")
    for argument in ({"every_n_epochs": 0}, {"dtype": "fp8"}, {"max_shard_size": "many"}):
        with pytest.raises(TEDError, match=next(iter(argument))):
            HuggingFaceExport(tmp_path, **argument)  # type: ignore[arg-type]
