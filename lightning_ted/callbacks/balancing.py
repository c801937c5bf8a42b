"""Loads that are evened out without an auxiliary loss."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_ted.errors import TEDError
from lightning_ted.moe import expert_counts
from lightning_ted.moe.expert_parallel import expert_parallel_layers

#: With what the names of such biases end, in this package and in Hugging Face's families.
_ENDINGS = ("correction_bias", "expert_bias")


class ExpertBiasBalancing(Callback):
    """Move the routers' score-correction biases towards an even load, once a step (arXiv 2408.15664, algorithm 1).

    ``bias += update_rate * sign(mean load - load)``, where the load of an expert is the number of assignments of all ranks since
    the last step. Such a bias has a part in the choice of experts and none in their weights; it has no gradient and is saved with
    the model. Layers of this package have one with ``MoE(correction_bias=True)``; of Hugging Face's families, those whose routers
    keep an ``e_score_correction_bias`` or ``expert_bias``.

    Args:
        update_rate: By how much a bias moves in a step; scores are between 0 and 1.

    Raises:
        TEDError: If the rate is not positive; when training begins, if no MoE layer has such a bias.

    """

    def __init__(self, update_rate: float = 1e-3) -> None:
        if not update_rate > 0:
            raise TEDError(f"`update_rate={update_rate!r}` must be positive.")
        self.update_rate = update_rate
        self._loads: dict[str, Tensor] = {}
        self._step = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._loads, self._step = {}, trainer.global_step
        if not correction_biases(pl_module):
            raise TEDError(
                f"`ExpertBiasBalancing` finds no router with a score-correction bias in {type(pl_module).__name__}; build layers "
                "with `MoE(correction_bias=True)`, or leave the callback out."
            )

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for name, load_E in expert_counts(pl_module).items():
            self._loads[name] = self._loads[name] + load_E if name in self._loads else load_E
        if trainer.global_step == self._step:
            return  # accumulating
        self._step = trainer.global_step
        for name, bias in correction_biases(pl_module).items():
            if name in self._loads:
                update_(bias, self._loads[name], self.update_rate)
        self._loads = {}


@torch.no_grad()
def update_(bias: Tensor, load_E: Tensor, rate: float) -> None:
    """One step of one layer's bias, of ``E`` elements."""
    bias += rate * (load_E.mean() - load_E).sign().view(bias.shape).to(bias.dtype)


def correction_biases(module: nn.Module) -> dict[str, Tensor]:
    """The biases of all MoE layers that have one, by the name of the layer: as :func:`~lightning_ted.moe.expert_counts` has it."""
    found: dict[str, Tensor] = {}
    for name, layer in expert_parallel_layers(module).items():
        # A MoE layer of this package has its router inside; Hugging Face's experts have it beside them.
        block = layer if isinstance(layer, nn.Module) else module.get_submodule(name.rpartition(".")[0])
        tensors = (*block.named_buffers(), *block.named_parameters())
        biases = [t for leaf, t in tensors if leaf.endswith(_ENDINGS) and t.numel() == layer.num_experts]
        if len(biases) == 1:
            found[name] = biases[0]
    return found
