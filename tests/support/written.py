"""A checkpoint directory as two ranks may have written it, made in this process without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_ted.checkpoint import distributed
from lightning_ted.checkpoint.boxes import Box
from lightning_ted.checkpoint.contents import Contents
from lightning_ted.checkpoint.portions import Portion

_GENERATOR = torch.Generator().manual_seed(3)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_GENERATOR)


WEIGHTS = {
    "net.up.weight": _random(30, 20),
    "net.up.bias": _random(30),
    "net.half": _random(6, 5).bfloat16(),
    "net.seen": torch.tensor(7),
    "net.empty": torch.empty(0, 3),
}
ALIASES = {"net.tied": "net.up.weight"}
PARAMETERS = ["net.up.weight", "net.up.bias", "net.half"]
MOMENTS = {
    f"optimizer/0/{name}/{key}": _random(*WEIGHTS[name].shape)
    for name in PARAMETERS[:2]  # the last one has never been stepped
    for key in ("exp_avg", "exp_avg_sq")
}
AVERAGES = {"callbacks.Averages.net.up.weight": _random(30, 20)}
GROUPS = [
    {"lr": 0.1, "betas": (0.9, 0.99), "params": PARAMETERS[:1]},
    {"lr": 0.2, "betas": (0.9, 0.99), "params": PARAMETERS[1:]},
]
RANKS = {"tensor": 2, "ranks": [{"random": {"torch": torch.arange(rank, 9)}, "loaders": []} for rank in range(2)]}
LAYOUT = {"world_size": 2, "tensor": 2, "expert": 1, "expert_tensor": 2, "order": "expert_first", "zero_stage": 1}
INFO = {
    "model": "Model",
    "global_step": 12,
    "epoch": 3,
    "time": 1e9,
    "layout": LAYOUT,
    "precision": "32-true",
    "optimizers": ["AdamW"],
    "versions": {"torch": "2.13.0", "lightning": "2.6.6"},
}


def state() -> dict[str, Any]:
    """Plain data, as in ``state.pt``."""
    return {
        "epoch": 3,
        "global_step": 12,
        "pytorch-lightning_version": "2.6.6",
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {
            "Averages": {
                "net.up.weight": {
                    "lightning_ted.tensor": "callbacks.Averages.net.up.weight",
                    "parameter": "net.up.weight",
                },
                "decay": 0.5,
            }
        },
        "lr_schedulers": [{"last_epoch": 3}],
        "hyper_parameters": {"width": 20},
        "state_dict": {
            "order": [
                "net.up.weight",
                "net.tied",
                *[name for name in WEIGHTS if name != "net.up.weight"],
                "net._extra_state",
            ],
            "aliases": ALIASES,
            "others": {"net._extra_state": {"plain": 1}},
            "versions": {"": {"version": 1}},
        },
        "optimizer_states": [
            {
                "param_groups": [dict(group) for group in GROUPS],
                "state": {name: {"step": torch.tensor(12.0)} for name in PARAMETERS[:2]},
                "class": "AdamW",
            }
        ],
    }


def write_directory(folder: Path, tensors: dict[str, dict[str, Tensor]] | None = None) -> Path:
    """Write it, each tensor of several rows in two boxes."""
    parts = tensors or {"model": WEIGHTS, "training": MOMENTS, "extra": AVERAGES}
    portions = {part: {name: _portion(tensor) for name, tensor in found.items()} for part, found in parts.items()}
    distributed.write(Contents(portions, state(), RANKS, INFO), folder, None)
    return folder


def _portion(tensor: Tensor) -> Portion:
    if not tensor.dim() or len(tensor) < 2:
        return Portion.whole(tensor)
    rest = tuple(tensor.shape[1:])
    first = len(tensor) // 3 + 1
    boxes = [
        Box((0, *(0 for _ in rest)), (first, *rest)),
        Box((first, *(0 for _ in rest)), (len(tensor) - first, *rest)),
    ]
    return Portion(tuple(tensor.shape), tensor.dtype, boxes, [tensor[:first], tensor[first:]])
