"""A decoder-only language model of two shapes, GPT and Qwen3-MoE, written as for one device.

Nothing here communicates. What makes it ready for tensor parallelism is the attribute ``tp_plan`` (which linear layer is
cut which way) and attention that counts its heads with ``-1``, so that it runs on however many heads its rank was given.
Expert parallelism needs nothing at all: ``MoE`` layers are found by their type.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ted.moe import MoE, swiglu


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a :class:`Decoder`; the defaults are a small GPT with top-2 experts in every second layer.

    Attributes:
        vocab_size: Number of tokens that the model knows; 256 for bytes.
        sequence_length: Longest sequence, in tokens.
        num_layers: Number of blocks.
        d_model: Width of the residual stream.
        num_heads: Number of attention heads; divides ``d_model``.
        num_kv_heads: Number of key and value heads, shared by equally many query heads each; None for as many as
            ``num_heads``.
        ffn_width: Hidden width of the dense feed-forward layers.
        moe_every: Every how many layers the feed-forward layer is a mixture of experts: the last of each such group;
            0 for a dense model.
        num_experts: Number of experts in each mixture.
        expert_width: Hidden width of one expert.
        top_k: Number of experts that each token visits.
        normalize_top_k: Whether the weights of the chosen experts are scaled to sum to 1. With ``top_k=1`` the weight
            would be 1 whatever the router says, and only the auxiliary loss would train it.
        capacity_factor: Largest load of an expert, in multiples of the mean; tokens above it are dropped. None: no
            limit.
        activation: ``"gelu"`` (up, down) or ``"swiglu"`` (gate, up, down) feed-forward layers.
        norm: ``"layer"`` or ``"rms"``.
        positions: ``"learned"`` (an embedding added to the input) or ``"rotary"`` (queries and keys turned by
            position).
        bias: Whether the linear layers of the blocks have biases.
        qk_norm: Whether queries and keys pass an RMSNorm per head.
        dropout: Probability of a zero, in the residual stream and in the attention weights.
        tie_embeddings: Whether the output head and the token embedding are one parameter.
        vocab_parallel: Whether embedding, head and loss are cut over the vocabulary under tensor parallelism.
        aux_loss_coef: Weight of the load-balancing loss.
        z_loss_coef: Weight of the router's z-loss.

    """

    vocab_size: int = 256
    sequence_length: int = 256
    num_layers: int = 4
    d_model: int = 256
    num_heads: int = 8
    num_kv_heads: int | None = None
    ffn_width: int = 1024
    moe_every: int = 2
    num_experts: int = 8
    expert_width: int = 1024
    top_k: int = 2
    normalize_top_k: bool = True
    capacity_factor: float | None = None
    activation: Literal["gelu", "swiglu"] = "gelu"
    norm: Literal["layer", "rms"] = "layer"
    positions: Literal["learned", "rotary"] = "learned"
    bias: bool = True
    qk_norm: bool = False
    dropout: float = 0.0
    tie_embeddings: bool = False
    vocab_parallel: bool = False
    aux_loss_coef: float = 0.01
    z_loss_coef: float = 0.0

    def __post_init__(self) -> None:
        if self.d_model % self.num_heads:
            raise ValueError(f"`num_heads={self.num_heads}` does not divide `d_model={self.d_model}`.")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"`num_kv_heads={self.num_kv_heads}` does not divide `num_heads={self.num_heads}`.")
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head dimension, not {self.d_model}/{self.num_heads}.")

    @classmethod
    def gpt(cls, **changes: Any) -> DecoderConfig:
        """GPT: GELU, LayerNorm, learned positions, biases, top-1 experts."""
        return replace(cls(top_k=1, normalize_top_k=False), **changes)

    @classmethod
    def qwen3_moe(cls, **changes: Any) -> DecoderConfig:
        """Qwen3-MoE: swiglu, RMSNorm, rotary positions, query and key norms, no biases, top-2 experts."""
        shape = cls(activation="swiglu", norm="rms", positions="rotary", bias=False, qk_norm=True)
        return replace(shape, **changes)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def is_moe(self, layer: int) -> bool:
        """Whether the feed-forward layer of block ``layer`` is a mixture of experts."""
        return self.moe_every > 0 and (layer + 1) % self.moe_every == 0

    @property
    def has_moe(self) -> bool:
        """Whether any layer is a mixture of experts."""
        return any(map(self.is_moe, range(self.num_layers)))

    def num_params(self) -> int:
        """Number of parameters of the model that this configuration builds, a tied one counted once."""
        d, kv_width = self.d_model, self.kv_heads * self.head_dim
        has_bias = int(self.bias)
        norm = d * (2 if self.norm == "layer" else 1)
        attention = 2 * d * d + 2 * d * kv_width + has_bias * (2 * d + 2 * kv_width)
        attention += 2 * self.head_dim if self.qk_norm else 0
        moe_layers = sum(map(self.is_moe, range(self.num_layers)))
        moe = d * self.num_experts + self.num_experts * self._ffn_params(self.expert_width)
        ffns = moe_layers * moe + (self.num_layers - moe_layers) * self._ffn_params(self.ffn_width)
        embeddings = self.vocab_size * d * (1 if self.tie_embeddings else 2)
        embeddings += self.sequence_length * d if self.positions == "learned" else 0
        return embeddings + self.num_layers * (attention + 2 * norm) + ffns + norm

    def _ffn_params(self, width: int) -> int:
        columns = (2 if self.activation == "swiglu" else 1) * width
        return self.d_model * (columns + width) + (columns + self.d_model if self.bias else 0)


def make_norm(config: DecoderConfig) -> nn.Module:
    """The norm of the residual stream."""
    return nn.LayerNorm(config.d_model) if config.norm == "layer" else nn.RMSNorm(config.d_model, eps=1e-6)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the two halves of each head, as planes, by the angle of each position (arXiv 2104.09864)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Causal self-attention on however many heads the projections hold."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.kv_heads  # of all ranks together
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        kv_width = config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        self.k_proj = nn.Linear(config.d_model, kv_width, bias=config.bias)
        self.v_proj = nn.Linear(config.d_model, kv_width, bias=config.bias)
        self.o_proj = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=1e-6) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_dim, eps=1e-6) if config.qk_norm else None
        self.rotary = config.positions == "rotary"
        if self.rotary:
            frequency = 10_000 ** (-torch.arange(0, config.head_dim, 2).float() / config.head_dim)
            angle = torch.outer(torch.arange(config.sequence_length).float(), frequency)
            self.register_buffer("cos", angle.cos(), persistent=False)
            self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, sequence, d_model]`` to the same."""
        q, k, v = self._heads(self.q_proj(x)), self._heads(self.k_proj(x)), self._heads(self.v_proj(x))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:
            cos, sin = self.cos[: q.shape[-2]], self.sin[: q.shape[-2]]
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mixed = F.scaled_dot_product_attention(
            q,
            k,
            v,
            is_causal=True,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)


class FeedForward(nn.Module):
    """The dense feed-forward layer."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        d, width = config.d_model, config.ffn_width
        self.gated = config.activation == "swiglu"
        self.up_proj = nn.Linear(d, 2 * width if self.gated else width, bias=config.bias)
        self.down_proj = nn.Linear(width, d, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., d_model]`` to the same."""
        hidden = self.up_proj(x)
        return self.down_proj(swiglu(hidden) if self.gated else F.gelu(hidden))


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a norm and beside the residual stream."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.ffn_norm = make_norm(config)
        self.ffn: nn.Module = FeedForward(config)
        if config.is_moe(layer):
            self.ffn = MoE(
                config.d_model,
                config.expert_width,
                config.num_experts,
                top_k=config.top_k,
                activation=config.activation,
                bias=config.bias,
                capacity_factor=config.capacity_factor,
                normalize_top_k=config.normalize_top_k,
                aux_loss_coef=config.aux_loss_coef,
                z_loss_coef=config.z_loss_coef,
            )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, sequence, d_model]`` to the same."""
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class Decoder(nn.Module):
    """The language model: tokens in, logits out.

    Args:
        config: Its shape.

    ``loss`` is a module and not a function call so that a plan can replace it: with ``vocab_parallel`` the logits are
    this rank's slice of the vocabulary, and only the vocabulary-parallel loss knows what to do with them.

    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        learned = config.positions == "learned"
        self.positions = nn.Embedding(config.sequence_length, config.d_model) if learned else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = make_norm(config)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.loss = nn.CrossEntropyLoss()
        self._init_weights()
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.tp_plan = self._make_tp_plan()

    def forward(self, tokens: Tensor) -> Tensor:
        """``[batch, sequence]`` token ids to logits ``[batch, sequence, vocab_size]`` (this rank's slice, if cut)."""
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def _init_weights(self) -> None:
        # GPT-2's: a fixed deviation, smaller for what is added to the residual stream, so that its variance stays near
        # that of the embedding however many layers add to it. MoE layers keep their own.
        residual = 1 / math.sqrt(2 * self.config.num_layers)
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                scale = residual if name.endswith(("o_proj", "down_proj")) else 1.0
                nn.init.normal_(module.weight, std=0.02 * scale)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def _make_tp_plan(self) -> dict[str, str]:
        config = self.config
        plan = {f"blocks.*.attention.{name}": "colwise" for name in ("q_proj", "k_proj", "v_proj")}
        plan["blocks.*.attention.o_proj"] = "rowwise"
        if config.qk_norm:
            # One weight for all heads, each rank with its own heads: the gradients of the ranks are parts of a sum.
            plan["blocks.*.attention.q_norm"] = "replicated_with_grad_allreduce"
            plan["blocks.*.attention.k_norm"] = "replicated_with_grad_allreduce"
        if not all(map(config.is_moe, range(config.num_layers))):
            # Gate and up projection are one weight: each rank gets a part of both.
            plan["blocks.*.ffn.up_proj"] = "packed_colwise" if config.activation == "swiglu" else "colwise"
            plan["blocks.*.ffn.down_proj"] = "rowwise"
        if config.vocab_parallel:
            plan |= {"embedding": "embedding_rowwise", "head": "colwise", "loss": "vocab_parallel_loss"}
        return plan
