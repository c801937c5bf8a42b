"""A script for Lightning's ``ModelParallelStrategy`` under ``TEDStrategy``: the line that makes the strategy is all that changes.

``python -m examples.model_parallel_port.train`` trains a small decoder on two processes of this machine's CPU.
"""

from __future__ import annotations

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.data import DataLoader

from lightning_ted import TEDStrategy


class Attention(nn.Module):
    """Causal self-attention ``[B, S, D] -> [B, S, D]``; it runs on the heads that its projections give it."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.head_dim = d_model // num_heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(d_model, d_model) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        return self.wo(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """Gated feed-forward network ``[B, S, D] -> [B, S, D]``."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model), nn.Linear(d_model, d_ff)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """A layer of the decoder, ``[B, S, D] -> [B, S, D]``."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.attention = Attention(d_model, num_heads)
        self.feed_forward: nn.Module = FeedForward(d_model, 2 * d_model)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Decoder(nn.Module):
    """Token ids ``[B, S]`` to logits ``[B, S, V]``."""

    def __init__(self, vocabulary: int = 32, d_model: int = 16, num_heads: int = 4, num_layers: int = 2) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocabulary, d_model)
        self.layers = nn.ModuleList(Block(d_model, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(d_model)
        self.output = nn.Linear(d_model, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.output(self.norm(x))


def parallelize(model: Decoder, tp_mesh: DeviceMesh, sequence_parallel: bool = True) -> None:
    """Cut a decoder by torch's styles; ``sequence_parallel`` also splits what lies between the layers over the tokens."""
    between = Shard(1) if sequence_parallel else Replicate()
    plan = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "output": ColwiseParallel(input_layouts=between, output_layouts=Replicate()),
    }
    parallelize_module(model, tp_mesh, plan | ({"norm": SequenceParallel()} if sequence_parallel else {}))
    for block in model.layers:
        plan = {
            **{f"attention.{name}": ColwiseParallel() for name in ("wq", "wk", "wv")},
            "attention.wo": RowwiseParallel(output_layouts=between),
            "feed_forward.w1": ColwiseParallel(),
            "feed_forward.w3": ColwiseParallel(),
            "feed_forward.w2": RowwiseParallel(output_layouts=between),
        }
        if sequence_parallel:
            gathered = {"input_layouts": (Shard(1),), "desired_input_layouts": (Replicate(),)}
            plan |= {name: PrepareModuleInput(**gathered) for name in ("attention", "feed_forward")}
            plan |= {name: SequenceParallel() for name in ("attention_norm", "ffn_norm")}
        parallelize_module(block, tp_mesh, plan)


class LitDecoder(L.LightningModule):
    """Learns to say which token comes next."""

    def __init__(self, sequence_parallel: bool = True, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model: Decoder | None = None

    def configure_model(self) -> None:
        if self.model is not None:
            return
        torch.manual_seed(1)
        self.model = Decoder()
        if self.device_mesh is not None:
            parallelize(self.model, self.device_mesh["tensor_parallel"], self.hparams["sequence_parallel"])

    def _loss(self, tokens: Tensor) -> Tensor:
        assert self.model is not None
        return F.cross_entropy(self.model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch), sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        assert self.model is not None
        return self.model(batch[:, 1:])[:, -1].argmax(-1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"], momentum=0.9)


def loader(samples: int = 32, length: int = 9, batch_size: int = 4) -> DataLoader:
    """Sequences of token ids that count upwards, in steps of one to four."""
    generator = torch.Generator().manual_seed(2)
    start, step = (torch.randint(high, (samples, 1), generator=generator) for high in (32, 4))
    return DataLoader((start + (step + 1) * torch.arange(length)) % 32, batch_size=batch_size)


def main(devices: int = 2, max_epochs: int = 2) -> L.Trainer:
    """Train on processes of this machine's CPU; returns the ``Trainer``, whose ``callback_metrics`` hold the losses."""
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        # Was: ModelParallelStrategy(tensor_parallel_size=2, data_parallel_size=devices // 2)
        strategy=TEDStrategy(tensor_parallel_size=2),
        max_epochs=max_epochs,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(LitDecoder(), loader(), loader())
    return trainer


if __name__ == "__main__":
    print(f"val_loss {main().callback_metrics['val_loss'].item():.3f}")
