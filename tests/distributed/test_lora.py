"""Adapters of peft, on dense layers and on experts, train under every layout as they do in one process."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ted.adapters import adopt
from lightning_ted.errors import UnsupportedError
from lightning_ted.mesh import TEDMesh
from lightning_ted.strategy.partition import PartitionOptions, partition_module
from lightning_ted.topology import Topology
from tests.support.models import TinyConfig, TinyDecoder
from tests.support.pool import Pools
from tests.support.stacks import cut

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
            if "lora" in name or "modules_to_save" in name:
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


#: Dense adapters of other kinds: what `LoraConfig` is given.
KINDS: dict[str, dict[str, Any]] = {
    "rslora, biases": {"target_parameters": None, "use_rslora": True, "lora_bias": True, "bias": "all"},
    "all but experts": {"target_parameters": None, "target_modules": "all-linear"},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "copies": {"modules_to_save": ["lm_head", "gate", "o_proj"], "target_modules": ["q_proj", "k_proj"]},
    "copied experts": {"modules_to_save": ["experts"], "target_parameters": None},
    "first projection only": {"target_modules": None, "target_parameters": EXPERTS["qwen3_moe"][:1]},
    "second projection only": {"r": 3, "target_modules": None, "target_parameters": EXPERTS["qwen3_moe"][1:]},
}


def _two_adapters(kind: str, adopts: bool) -> nn.Module:
    """Both in use and trained, of different ranks."""
    from peft import LoraConfig

    model: Any = adapted(kind)
    if adopts:
        adopt(model)  # as before processes are started
    model.add_adapter("other", LoraConfig(r=8, target_modules=ATTENTION[1:], target_parameters=EXPERTS[kind]))
    model.base_model.set_adapter(["default", "other"])
    return perturb(model)


def _injected(kind: str) -> nn.Module:
    """Adapters inside a model that stays the outermost one."""
    from peft import LoraConfig, inject_adapter_in_model

    options = LoraConfig(r=4, target_modules=ATTENTION, target_parameters=EXPERTS[kind])
    return perturb(inject_adapter_in_model(options, build(kind)))


class Causal(TinyDecoder):
    """Called as a model of transformers is."""

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:  # type: ignore[override]
        return SimpleNamespace(logits=super().forward(input_ids))


def _tiny(kind: str) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    model = Causal(TinyConfig(vocab=64, packed=kind == "packed"))
    names = ["q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "head"]
    return perturb(get_peft_model(model, LoraConfig(r=3, target_modules=names)))  # type: ignore[arg-type]


def _compare_kinds() -> dict[str, Difference]:
    found = {}
    for name, options in KINDS.items():
        found[name] = compare("qwen3_moe", 2, 1, 2, partial(adapted, **options))
    found["biases of gpt_oss"] = compare("gpt_oss", 2, 2, 1, partial(adapted, bias="lora_only"))
    found["injected"] = compare("qwen3_moe", 2, 1, 2, _injected)
    for adopts in (False, True):
        found[f"two adapters {adopts}"] = compare("qwen3_moe", 2, 1, 2, partial(_two_adapters, adopts=adopts))
    for kind in ("packed", "separate"):
        for split in (False, True):
            found[f"{kind}, sequence parallel {split}"] = compare(kind, 2, 2, 1, _tiny, split)
    return found


def test_every_kind_of_adapter_trains_like_one_process(pools: Pools) -> None:
    for rank in pools(2).run(_compare_kinds):
        for name, found in rank.items():
            assert found.logits < 1e-6 and found.gradient < 1e-5 and found.norm < 1e-6, f"{name}: {found}"


def _late() -> list[str]:
    """What is said of adapters that are made when layers, or experts, have been cut."""
    from peft import LoraConfig, get_peft_model

    messages = []
    for options, topology in (
        ({"target_modules": ["q_proj"]}, Topology(2, 2)),
        ({"target_modules": ["embed_tokens"]}, Topology(2, 2)),
        ({"target_modules": None, "target_parameters": EXPERTS["qwen3_moe"]}, Topology(2, 1, 2)),
    ):
        root = nn.ModuleDict({"model": build("qwen3_moe")})
        partition_module(root, mesh := TEDMesh(topology), PartitionOptions())
        root["model"] = get_peft_model(root["model"], LoraConfig(r=4, **options))  # type: ignore[arg-type]
        with pytest.raises(UnsupportedError) as caught:
            partition_module(root, mesh, PartitionOptions())
        messages.append(str(caught.value))
    model: Any = adapted("qwen3_moe")
    partition_module(model, TEDMesh(Topology(2, 1, 2)), PartitionOptions())
    model.add_adapter("other", LoraConfig(r=4, target_modules=ATTENTION, target_parameters=EXPERTS["qwen3_moe"]))
    model.set_adapter("other")
    with pytest.raises(UnsupportedError) as caught:
        model(input_ids=torch.ones((1, 2), dtype=torch.int64))
    return [*messages, str(caught.value)]


def test_adapters_that_come_too_late_are_refused(pools: Pools) -> None:
    for dense, embedding, experts, second in pools(2).run(_late):
        assert "embed_tokens' got adapters after it had been cut" in embedding
        assert "Adapter 'other' of Qwen3MoeExperts was made after the experts had been shared out" in second
        assert "self_attn.q_proj' got adapters after it had been cut" in dense and "`configure_model`" in dense
        assert "mlp.experts' got adapters after they had been shared out" in experts and "`configure_model`" in experts


def _dropout() -> tuple[dict[str, list[list[bool]]], list[Tensor], float]:
    """Zeros of dropout by what it is drawn on, gradients of first factors beside columns, and what is drawn afterwards."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(7)
    options = LoraConfig(r=3, lora_dropout=0.5, target_modules=["q_proj", "v_proj", "o_proj"])
    model = perturb(get_peft_model(TinyDecoder(TinyConfig(dropout=0.5)), options)).train()  # type: ignore[arg-type]
    block = cut(model, PartitionOptions()).base_model.model.blocks[0]  # type: ignore[union-attr, index]
    kinds = {(2, 6, 16): "whole", (2, 6, 8): "split", (2, 2, 6, 6): "heads"}
    found: dict[str, list[list[bool]]] = {kind: [] for kind in kinds.values()}
    original = F.dropout

    def spy(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        mask = original(torch.ones_like(x), p, training)
        found[kinds[tuple(x.shape)]].append((mask == 0).flatten().tolist())
        return x * mask

    F.dropout = spy  # type: ignore[assignment]
    try:
        block(torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1))).square().sum().backward()  # type: ignore[operator]
    finally:
        F.dropout = original  # type: ignore[assignment]
    grads = [p.grad for name, p in block.named_parameters() if "lora_A" in name and "o_proj" not in name]  # type: ignore[union-attr]
    return found, grads, torch.rand(1).item()  # type: ignore[return-value]


def test_dropout_of_adapters_agrees_on_whole_inputs_and_differs_on_split_ones(pools: Pools) -> None:
    (first, grads, after), (second, others, after_too) = pools(2).run(_dropout)
    assert {kind: len(masks) for kind, masks in first.items()} == {"whole": 4, "split": 1, "heads": 1}
    assert first["whole"] == second["whole"] and after == after_too
    assert first["split"] != second["split"] and first["heads"] != second["heads"]
    assert len(grads) == 2
    for one, other in zip(grads, others, strict=True):
        torch.testing.assert_close(one, other)
