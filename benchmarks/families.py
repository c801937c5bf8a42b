"""Small models of Hugging Face's families of mixture-of-experts models: does each of them train like one process?

``python -m benchmarks.families`` compares, for every family, logits, every gradient and the global norm under two layouts of two
processes (``--world 4``: of four) with those of one process, and prints a table. What is constant when a model is made (biases,
norms, correction buffers) is perturbed: zeros hide errors.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.fresh import in_fresh_processes

#: What makes a model small, where its configuration has it.
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 4,
    "attention_dropout": 0.0,
    **dict.fromkeys(("pad_token_id",), 0),
    **dict.fromkeys(("bos_token_id", "eos_token_id"), 1),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "topk_group", "mamba_n_groups", "n_groups", "mamba_expand"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 0),
    **dict.fromkeys(
        ("shared_expert_intermediate_size", "shared_intermediate_size", "moe_shared_expert_intermediate_size"), 16
    ),
    # Multi-head latent attention.
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    # Linear attention and state spaces.
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    **dict.fromkeys(("mamba_d_state", "ssm_state_size"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 8),
}
_LATENT = {"num_key_value_heads": 4, "head_dim": 4}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}

#: Families by model type, with what their configurations want besides.
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "qwen3_next": _HYBRID,
    "olmoe": {},
    "flex_olmo": {},
    "phimoe": {},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "gpt_oss": {},
    "granitemoe": {},
    "granitemoeshared": {},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "glm4_moe": {},
    "glm4_moe_lite": _LATENT,
    "minimax": {},
    "minimax_m2": {},
    "ernie4_5_moe": {},
    "hunyuan_v1_moe": {},
    "dots1": {},
    "nemotron_h": {},
    "jamba": {"num_hidden_layers": 8, "mamba_dt_rank": 4},
    "aria_text": {},
    "afmoe": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "exaone_moe": {},
    "mimo_v2_flash": {},
    "solar_open": {},
    "kimi_linear": {},
    "hy_v3": {},
    "laguna": {},
    "cohere2_moe": {},
    "flint": {},
    "qwen3_5_moe_text": _HYBRID,
    "deepseek_v32": {**_LATENT, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 64},
    "granitemoe_swa": {},
    "glm_moe_dsa": {**_LATENT, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 64},
    "axk1": _LATENT,
    "axk2": _LATENT,
    "beam": {},
    "kolibri1": {},
    "mellum": {},
    "minimax_m3_vl_text": {},
    # Those with adapters of their own.
    "llama4_text": {"intermediate_size_mlp": 32, "interleave_moe_layer_step": 1, "use_qk_norm": False},
    "longcat_flash": {"num_key_value_heads": 4, "head_dim": 4, "zero_expert_num": 4, "expert_ffn_hidden_size": 16}
    | {"ffn_hidden_size": 32, "moe_topk": 3},
    "step3p7": {"mlp_layer_types": ["dense", "sparse"], "swiglu_limits": [None, 0.05], "share_expert_dim": 16},
}
#: Of those that the library has no language model of, the class to take: it returns hidden states.
_CLASSES = {"step3p7": "Step3p7TextModel"}

#: Tensor, expert and expert-tensor degree on so many processes.
LAYOUTS = {2: ((1, 2, 1), (2, 1, 2)), 4: ((2, 2, 2), (2, 4, 1))}
TOKENS = (4, 8)


def build(kind: str) -> nn.Module:
    """A small model of a family, without a constant in it."""
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    configuration = type(AutoConfig.for_model(kind).get_text_config())
    known = vars(configuration())
    options = {key: value for key, value in SMALL.items() if key in known} | FAMILIES[kind]
    torch.manual_seed(1)
    make = getattr(transformers, _CLASSES[kind])._from_config if kind in _CLASSES else AutoModelForCausalLM.from_config
    model = make(configuration(**options), attn_implementation="eager")
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            noise = 0.1 * torch.randn(tensor.shape, generator=generator)
            if isinstance(tensor, nn.Parameter):
                tensor += noise
            elif "correction" in name:
                tensor += noise.to(tensor.dtype)
    return model.eval()


@dataclass(frozen=True)
class Difference:
    """How far a rank is from one process, relative to the norm of what is compared.

    Attributes:
        logits: Of its share of the batch.
        gradient: Of the worst gradient.
        worst: Its name.
        norm: Of the global norm.

    """

    logits: float
    gradient: float
    worst: str
    norm: float


def loss_of(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (without a head, hidden states) and the mean loss of the next token (or of some direction)."""
    outputs = model(input_ids=tokens, use_cache=False)
    if not hasattr(outputs, "logits"):
        hidden = outputs.last_hidden_state
        return hidden.detach(), (hidden * torch.linspace(-1, 1, hidden.shape[-1])).mean()
    logits = outputs.logits
    return logits.detach(), nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def compare(
    kind: str,
    tensor: int,
    expert: int,
    expert_tensor: int,
    build: Callable[[str], nn.Module] = build,
    sequence_parallel: bool = False,
) -> Difference:
    """What one rank of a layout makes of its share of a batch, beside what one process makes of all of it."""
    from lightning_ted.mesh import TEDMesh
    from lightning_ted.optim.options import TrainingOptions
    from lightning_ted.strategy.partition import PartitionOptions, partition_module
    from lightning_ted.strategy.training import Training
    from lightning_ted.topology import Topology

    torch.set_num_threads(1)
    tokens = torch.randint(3, 64, TOKENS, generator=torch.Generator().manual_seed(3))
    whole = build(kind)
    want_logits, loss = loss_of(whole, tokens)
    loss.backward()
    topology = Topology(dist.get_world_size(), tensor, expert, expert_tensor)
    mesh = TEDMesh(topology)
    model = build(kind)
    options = PartitionOptions(sequence_parallel=sequence_parallel)
    layouts = partition_module(model, mesh, options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    here = torch.device("cpu")
    training = Training(dict(model.named_parameters()), mesh, layouts, options, TrainingOptions(), {}, here)
    training.shard([optimizer], lambda _: False)
    at = mesh.axis("data")
    logits, loss = loss_of(model, tokens.chunk(at.size)[at.rank])
    with training.backward():
        loss.backward()
    share: Any = optimizer.sharded  # type: ignore[attr-defined]
    worst = ("", 0.0)
    for name, parameter in whole.named_parameters():
        if not parameter.requires_grad:
            continue
        layout = layouts[name]
        index: dict[str, int] = {cut.axis: mesh.axis(cut.axis).rank for cut in layout.cuts}
        want = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        got = share.local_gradient(model.get_parameter(name))
        part = layout.part(want, index)
        difference = (part if got is None else got - part).norm() / want.norm().clamp_min(1e-12)
        if not float(difference) <= worst[1]:
            worst = name, float(difference)
    norm = float(share.grad_norm())
    want_norm = float(torch.nn.utils.get_total_norm([p.grad for p in whole.parameters() if p.grad is not None]))
    training.close()
    part = want_logits.chunk(at.size)[at.rank]
    return Difference(float((logits - part).norm() / part.norm()), worst[1], worst[0], abs(norm / want_norm - 1))


def compare_all(kinds: Sequence[str], layouts: Sequence[tuple[int, int, int]]) -> list[list[Difference | str]]:
    """For each family, that of each layout on this rank; why it failed, if it did."""
    found: list[list[Difference | str]] = []
    for kind in kinds:
        row: list[Difference | str] = []
        for layout in layouts:
            try:
                row.append(compare(kind, *layout))
            except Exception as error:
                row.append(f"{type(error).__name__}: {error}")
        found.append(row)
    return found


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--world", type=int, choices=LAYOUTS, default=2)
    args = parser.parse_args(given)
    layouts = LAYOUTS[args.world]
    rows = in_fresh_processes(_ranks, {"kinds": args.families, "layouts": layouts}, args.world, threads=1)
    wrong = 0
    titles = [f"tensor {t} x expert {e} x expert-tensor {s}" for t, e, s in layouts]
    print(f"{'family':20}" + "".join(f"{title:>44}" for title in titles))
    for kind, *ranks in zip(args.families, *rows, strict=True):
        cells = []
        for differences in zip(*ranks, strict=True):
            failures = [found for found in differences if isinstance(found, str)]
            if failures:
                cells.append(failures[0][:120])
                wrong += 1
                continue
            logits, gradient, norm = (max(d[key] for d in differences) for key in ("logits", "gradient", "norm"))
            worst = max(differences, key=lambda d: d["gradient"])["worst"]
            bad = logits > 1e-6 or gradient > 1e-5 or norm > 1e-5
            wrong += bad
            cells.append(f"{logits:.1e} {gradient:.1e} {norm:.1e} {'WRONG ' + worst if bad else 'right'}")
        print(f"{kind:20}" + "".join(f"{cell:>44}" for cell in cells), flush=True)
    return int(wrong > 0)


def _ranks(kinds: Sequence[str], layouts: Sequence[tuple[int, int, int]]) -> list[list[dict[str, Any] | str]]:
    dist.init_process_group("gloo")
    found = compare_all(kinds, layouts)
    dist.destroy_process_group()
    return [[one if isinstance(one, str) else asdict(one) for one in row] for row in found]


if __name__ == "__main__":
    sys.exit(main())
