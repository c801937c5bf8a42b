"""Adapters of peft, on dense layers and on experts, train under every layout as they do in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.support.pool import Pools

pytest.importorskip("peft")

from benchmarks.families import LAYOUTS, Difference, build, compare  # noqa: E402

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
#: Projections of experts that have adapters; biased, interleaved and transposed; without gates; transposed.
EXPERTS = {
    "qwen3_moe": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "gpt_oss": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "nemotron_h": ["mixer.experts.up_proj", "mixer.experts.down_proj"],
    "aria_text": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "deepseek_v3": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}


def perturb(model: nn.Module) -> nn.Module:
    """Second factors that are zero, as they are at first, would hide everything."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def adapted(kind: str, **options: Any) -> nn.Module:
    """A small model of a family with adapters."""
    from peft import LoraConfig, get_peft_model

    chosen: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "target_parameters": EXPERTS[kind]}
    if kind == "deepseek_v3":
        chosen["target_modules"] = ["q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "shared_experts.down_proj"]
    return perturb(get_peft_model(build(kind), LoraConfig(**chosen | options)))  # type: ignore[arg-type]


def _compare(cases: list[tuple[str, tuple[int, int, int]]]) -> list[Difference]:
    return [compare(kind, *layout, adapted) for kind, layout in cases]


@pytest.mark.parametrize(("world", "families"), [(2, list(EXPERTS)), (4, ["qwen3_moe", "gpt_oss"])], ids=["2", "4"])
def test_adapters_train_like_one_process_with_peft_alone(pools: Pools, world: int, families: list[str]) -> None:
    cases = [(family, layout) for family in families for layout in LAYOUTS[world]]
    for rows in pools(world).run(_compare, cases):
        for case, found in zip(cases, rows, strict=True):
            assert found.logits < 1e-6 and found.gradient < 1e-5 and found.norm < 1e-6, f"{case}: {found}"
