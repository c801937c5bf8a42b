"""Adapters that leave a run are those that have been trained, as plain peft reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ted.callbacks import HuggingFaceExport
from lightning_ted.convert import convert
from lightning_ted.errors import CheckpointError
from tests.support.pool import Pools

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402

from benchmarks.families import build  # noqa: E402
from tests.distributed.test_pretrained_export import Language, _fit  # noqa: E402

TOKENS = torch.arange(3, 27).view(3, 8)


def _adapted(kind: str) -> Any:
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        modules_to_save=["lm_head"],
    )
    torch.manual_seed(3)
    model = get_peft_model(build(kind), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


class Adapted(Language):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.model = _adapted(kind)


def _export(folder: Path) -> Tensor:
    run = _fit("tp2 ep2", Adapted("mixtral"), callbacks=[HuggingFaceExport(folder / "adapters")])
    run.save_checkpoint(folder / "x.ckpt")
    run.strategy.save_pretrained(folder / "adapters")  # type: ignore[attr-defined]  # a second time, into the same folder
    model: Any = run.lightning_module.model
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # peft asks
def test_adapters_are_read_by_peft_alone(pools: Pools, tmp_path: Path) -> None:
    want = pools(4).run(_export, tmp_path)[0]
    plain = PeftModel.from_pretrained(build("mixtral"), tmp_path / "adapters")
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(input_ids=TOKENS).logits, want, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(build("mixtral").eval()(input_ids=TOKENS).logits, want, atol=1e-2)
    with pytest.raises(CheckpointError, match="The checkpoint's model 'model' has adapters of peft"):
        convert(str(tmp_path / "x.ckpt"), str(tmp_path / "y"), to="huggingface")
