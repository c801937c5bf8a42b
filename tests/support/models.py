"""Small models that hold every kind of layer that a strategy cuts, in odd sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ted.moe import MoE, auxiliary_loss


@dataclass(frozen=True)
class TinyConfig:
    """Sizes of :class:`TinyDecoder`."""

    vocab: int = 24
    width: int = 16
    heads: int = 4
    hidden: int = 16
    experts: int = 4
    top_k: int = 2
    activation: str = "swiglu"
    score: str = "softmax"
    bias: bool = True
    capacity_factor: float | None = None
    vocab_parallel: bool = False
    packed: bool = False
    tied: bool = False
    dropout: float = 0.0
    shared: bool = False


class TinyAttention(nn.Module):
    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.num_heads = config.heads
        self.head_dim = config.width // config.heads
        self.packed = config.packed
        if config.packed:
            self.qkv_proj = nn.Linear(config.width, 3 * config.width)
        else:
            self.q_proj = nn.Linear(config.width, config.width)
            self.k_proj = nn.Linear(config.width, config.width)
            self.v_proj = nn.Linear(config.width, config.width)
        # A norm of the keys, too: without one, softmax makes the gradient of the keys' bias zero, up to rounding.
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-5)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-5)
        self.o_proj = nn.Linear(config.width, config.width)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(x).chunk(3, -1) if self.packed else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        # Written out: the fused attention has no float64 oracle of its own on every device.
        scores = self.q_norm(q) @ self.k_norm(k).transpose(-2, -1) / self.head_dim**0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        y = F.dropout(scores.masked_fill(future, -torch.inf).softmax(-1), self.dropout, self.training) @ v
        return self.o_proj(y.transpose(1, 2).flatten(-2))


class TinyFFN(nn.Module):
    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.hidden)
        self.up_proj = nn.Linear(config.width, config.hidden)
        self.down_proj = nn.Linear(config.hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TinyBlock(nn.Module):
    def __init__(self, config: TinyConfig, moe: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = TinyAttention(config)
        self.norm2 = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.ffn = (
            MoE(
                config.width,
                config.hidden,
                config.experts,
                config.top_k,
                config.activation,  # type: ignore[arg-type]
                bias=config.bias,
                capacity_factor=config.capacity_factor,
                score=config.score,  # type: ignore[arg-type]
                aux_loss_coef=0.1,
                z_loss_coef=0.01,
            )
            if moe
            else TinyFFN(config)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.ffn(self.norm2(x)))


class TinyDecoder(nn.Module):
    """Two blocks: one dense, one with experts."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList([TinyBlock(config, moe=False), TinyBlock(config, moe=True)])
        if config.shared:
            self.blocks.append(self.blocks[1])
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        self.loss = nn.CrossEntropyLoss()
        if config.tied:
            self.head.weight = self.embedding.weight
        columns = ["attention.qkv_proj"] if config.packed else [f"attention.{n}_proj" for n in "qkv"]
        self.tp_plan = {
            **{f"blocks.*.{name}": "packed_colwise:3" if config.packed else "colwise" for name in columns},
            "blocks.*.attention.q_norm": "replicated_with_grad_allreduce",
            "blocks.*.attention.k_norm": "replicated_with_grad_allreduce",
            "blocks.*.attention.o_proj": "rowwise",
            "blocks.0.ffn.gate_proj": "colwise",
            "blocks.0.ffn.up_proj": "colwise",
            "blocks.0.ffn.down_proj": "rowwise",
        }
        if config.vocab_parallel:
            self.tp_plan |= {"embedding": "embedding_rowwise", "head": "colwise", "loss": "vocab_parallel_loss"}
        # Constant parameters hide errors: a zero bias is right however often it is added.
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def step(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and loss of predicting every next token."""
        logits = self(tokens[:, :-1])
        loss = self.loss(logits.flatten(0, 1), tokens[:, 1:].flatten())
        return logits, loss + auxiliary_loss(self)
