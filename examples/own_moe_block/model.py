"""The model: plain torch and Lightning, written as for one device."""

from __future__ import annotations

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Expert(nn.Module):
    """A gated network ``[T, D] -> [T, D]``."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(width, hidden), nn.Linear(hidden, width), nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class OwnMoE(nn.Module):
    """Each token goes to the two experts with the highest scores; a loop over the experts, as one writes it first."""

    def __init__(self, width: int, hidden: int, num_experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, num_experts, bias=False)
        self.experts = nn.ModuleList(Expert(width, hidden) for _ in range(num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = x.reshape(-1, x.shape[-1])
        logits = self.router(tokens)
        weights, chosen = logits.softmax(-1).topk(2, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            token, choice = torch.where(chosen == number)
            out = out.index_add(0, token, weights[token, choice, None] * expert(tokens[token]))
        return out.view_as(x), logits


class Layer(nn.Module):
    """Attention, cut by this package's own plan for torch's layer, and the block."""

    def __init__(self, width: int, num_heads: int, hidden: int, num_experts: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.moe = OwnMoE(width, hidden, num_experts)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        h = self.norms[0](x)
        x = x + self.attention(h, h, h, attn_mask=mask, is_causal=True, need_weights=False)[0]
        out, logits = self.moe(self.norms[1](x))
        return x + out, logits


class LanguageModel(L.LightningModule):
    """Says which byte comes next.

    Args:
        width: Of the model.
        num_layers: Number of layers.
        num_heads: Heads of attention.
        hidden: Width of an expert.
        num_experts: Experts of each layer.
        sequence_length: At most.
        learning_rate: Of AdamW.
        z_loss: Weight of the squared log-sum of the router's logits, which the block returns.

    """

    def __init__(
        self,
        width: int = 64,
        num_layers: int = 2,
        num_heads: int = 4,
        hidden: int = 128,
        num_experts: int = 4,
        sequence_length: int = 64,
        learning_rate: float = 3e-3,
        z_loss: float = 1e-3,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(256, width)
        self.position = nn.Embedding(sequence_length, width)
        self.layers = nn.ModuleList(Layer(width, num_heads, hidden, num_experts) for _ in range(num_layers))
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        z = x.new_zeros(())
        for layer in self.layers:
            x, logits = layer(x)
            z = z + logits.logsumexp(-1).square().mean()
        return self.head(x), z

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        logits, z = self(batch[0])
        return F.cross_entropy(logits.flatten(0, 1), batch[1].flatten()) + self.hparams["z_loss"] * z

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        logits, _ = self(batch[0])
        self.log("val_loss", F.cross_entropy(logits.flatten(0, 1), batch[1].flatten()), sync_dist=True, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["learning_rate"])
