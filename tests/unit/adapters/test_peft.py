"""Adapters of peft that cannot be cut are refused before any process starts, and plans reach what they are put around."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_ted.adapters import adopt
from lightning_ted.errors import PlanError, UnsupportedError
from lightning_ted.layout import Cut
from lightning_ted.moe import MoE
from lightning_ted.moe.expert_parallel import expert_parallel_layers
from lightning_ted.strategy.sizes import module_styles, resolve_sizes
from lightning_ted.tensor_parallel.check import planned_cuts
from lightning_ted.topology import Topology

pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model  # noqa: E402

from benchmarks.families import build  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

ATTENTION = "base_model.model.model.layers.0.self_attn"
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def adapted(model: nn.Module, **options: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=2, **options))  # type: ignore[arg-type]


def resolved(model: nn.Module, tensor: Any = 2, world: int = 2, plan: Any = "auto") -> Topology:
    return resolve_sizes(model, world, world, tensor, "auto", None, "expert_first", plan)


def test_factors_are_cut_as_their_layers_are() -> None:
    model = adapted(build("qwen3_moe"), target_modules=["q_proj", "o_proj", "lm_head"])
    cuts = planned_cuts(model, module_styles(model, "auto"))
    assert (
        cuts[f"{ATTENTION}.q_proj.base_layer.weight"] == cuts[f"{ATTENTION}.q_proj.lora_B.default.weight"] == (0, (32,))
    )
    assert (
        cuts[f"{ATTENTION}.o_proj.base_layer.weight"] == cuts[f"{ATTENTION}.o_proj.lora_A.default.weight"] == (1, (32,))
    )
    assert "base_model.model.lm_head.base_layer.weight" in cuts
    others = [name for name in cuts if "lora" in name]
    assert len(others) == 2 * 2 and f"{ATTENTION}.k_proj.weight" in cuts


def test_factors_of_experts_are_cut_as_their_weights_are() -> None:
    model = adapted(build("gpt_oss"), target_modules=None, target_parameters=EXPERTS)
    adopt(model)
    (layer, *_) = expert_parallel_layers(model).values()
    cuts = layer.expert_cuts(Topology(4, 2, 2, 2))
    first, second = Cut(0, "expert", 2, (8,)), Cut(1, "expert", 2, (4, 4))
    assert {name: cut for name, cut in cuts.items() if "lora" in name} == {
        "base_layer.lora_A.default.weight": (first,),
        "base_layer.lora_B.default.weight": (
            second,
            cuts["base_layer.base_layer.gate_up_proj_bias"][1].__class__(0, "expert_tensor", 2, (64,)),
        ),
        "lora_A.default.weight": (first, Cut(1, "expert_tensor", 2, (32,))),
        "lora_B.default.weight": (second,),
    }


def test_who_names_the_base_means_the_layer() -> None:
    model = adapted(build("qwen3_moe"), target_modules=["q_proj"])
    named = module_styles(model, {f"{ATTENTION}.q_proj.base_layer": "colwise"})
    assert named == module_styles(model, {f"{ATTENTION}.q_proj": "colwise"})
    assert f"{ATTENTION}.q_proj.lora_B.default" in named


def test_heads_are_counted_through_adapters() -> None:
    model = adapted(build("qwen3_moe"), target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    with pytest.raises(PlanError, match="`tensor_parallel_size=4` does not divide '.*num_key_value_heads' = 2"):
        resolved(model, 4, 4)
    assert resolved(model, "auto", 4).tensor == 2


@pytest.mark.parametrize("tensor", [2, "auto"])
def test_dora_of_a_layer_that_is_cut_is_refused(tensor: Any) -> None:
    model = adapted(build("qwen3_moe"), target_modules=["q_proj"], use_dora=True)
    with pytest.raises(
        UnsupportedError, match=r"layers.0.self_attn.q_proj' has adapters of the kind Dora.*`use_dora=False`"
    ):
        resolved(model, tensor)
    assert resolved(model, 1).tensor == 1
    assert resolved(model, 2, plan={f"{ATTENTION}.k_proj": "colwise"}).tensor == 2


def test_adapters_of_a_layers_own_parameter_are_refused_where_it_is_cut() -> None:
    model = adapted(build("qwen3_moe"), target_modules=None, target_parameters=["q_proj.weight"])
    with pytest.raises(UnsupportedError, match="of the kind ParamWrapper.*`target_modules` for layers"):
        resolved(model)


def test_biases_of_experts_have_no_adapters() -> None:
    model = adapted(build("gpt_oss"), target_modules=None, target_parameters=["mlp.experts.down_proj_bias"])
    with pytest.raises(UnsupportedError, match="`target_parameters` names 'down_proj_bias' of GptOssExperts"):
        resolved(model, 1)


def test_adapters_of_an_old_release_are_refused() -> None:
    model = adapted(build("qwen3_moe"), target_modules=None, target_parameters=EXPERTS)
    for module in model.modules():
        if hasattr(module, "_did_swap_in_out_features"):
            module._did_swap_in_out_features = False
    with pytest.raises(UnsupportedError, match="before 0.19"):
        resolved(model, 1)


def test_experts_of_this_package_have_no_adapters() -> None:
    model = adapted(nn.Sequential(MoE(8, 8, 4)), target_modules=None, target_parameters=["experts.gate_up_proj"])
    with pytest.raises(UnsupportedError, match="names weights of the experts of 'base_model.model.0', a `MoE`"):
        resolved(model, 1)


def test_a_part_of_the_experts_is_not_merged() -> None:
    model = adapted(build("qwen3_moe"), target_modules=None, target_parameters=EXPERTS)
    adopt(model)
    wrapper = model.base_model.model.model.layers[0].mlp.experts
    wrapper.merge()
    wrapper.unmerge()
    for name in ("A", "B"):
        weight = getattr(wrapper, f"lora_{name}")["default"].weight
        weight.data = weight.data.chunk(2, 0 if name == "A" else 1)[0]
    with pytest.raises(UnsupportedError, match="Adapter 'default' holds the factors of this rank's experts only"):
        wrapper.merge()


def test_disabled_and_merged_adapters_of_experts() -> None:
    """As peft alone has them."""
    found = []
    for adopts in (False, True):
        model = adapted(build("qwen3_moe"), target_modules=None, target_parameters=EXPERTS)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.constant_(parameter, 0.1)
        if adopts:
            adopt(model)
        tokens = torch.arange(3, 11).view(1, 8)
        outputs = []
        with torch.no_grad():
            outputs.append(model(input_ids=tokens).logits)
            with model.disable_adapter():
                outputs.append(model(input_ids=tokens).logits)
            model.merge_adapter()
            outputs.append(model(input_ids=tokens).logits)
            with model.disable_adapter():
                outputs.append(model(input_ids=tokens).logits)
            outputs.append(model.merge_and_unload()(input_ids=tokens).logits)
        assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)
        found.append(torch.stack(outputs))
    torch.testing.assert_close(*found)
