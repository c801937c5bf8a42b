"""The decoder as a plain LightningModule: nothing in it depends on the strategy but one gather in ``generate``."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

from examples.decoder.model import Decoder, DecoderConfig
from lightning_ted.moe import auxiliary_loss


class DecoderModule(L.LightningModule):
    """Next-token prediction with AdamW, a linear warm-up and a cosine decay to a tenth.

    Args:
        config: Shape of the model.
        learning_rate: Highest learning rate, reached at the end of the warm-up.
        weight_decay: AdamW's decay, of matrices only.
        warmup_steps: Optimizer steps of the warm-up.

    """

    def __init__(
        self,
        config: DecoderConfig,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.1,
        warmup_steps: int = 20,
    ) -> None:
        super().__init__()
        if isinstance(config, dict):  # as a checkpoint keeps it: plain values can be loaded without trusting the file
            config = DecoderConfig(**config)
        self.save_hyperparameters(
            {
                "config": asdict(config),
                "learning_rate": learning_rate,
                "weight_decay": weight_decay,
                "warmup_steps": warmup_steps,
            }
        )
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.decoder = Decoder(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[batch, sequence]`` token ids to logits."""
        return self.decoder(tokens)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self._cross_entropy(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss + auxiliary_loss(self) if self.decoder.config.has_moe else loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self._cross_entropy(batch), prog_bar=True, sync_dist=True)

    def _cross_entropy(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, targets = batch
        return self.decoder.loss(self(tokens).flatten(0, 1), targets.flatten())

    def configure_optimizers(self) -> Any:
        named = list(self.named_parameters())
        matrices = [p for name, p in named if p.ndim >= 2 and not name.endswith("bias")]
        others = [p for name, p in named if p.ndim < 2 or name.endswith("bias")]
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=self.learning_rate,
            betas=(0.9, 0.95),
        )
        total = int(self.trainer.estimated_stepping_batches)

        def scale(step: int) -> float:
            warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
            progress = min(1.0, max(0, step - self.warmup_steps) / max(1, total - self.warmup_steps))
            return warm * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @torch.no_grad()
    def generate(self, prompt_ids: Tensor, n: int, temperature: float = 1.0, seed: int = 0) -> Tensor:
        """Continue a prompt, token by token.

        Every rank must call this: the experts of one layer live on several ranks.

        Args:
            prompt_ids: ``[prompt length]`` token ids; at least one.
            n: Number of tokens to add.
            temperature: Divisor of the logits; 0 takes the likeliest token.
            seed: Of the sampling; the same text on every rank and in every run.

        Returns:
            ``[prompt length + n]`` token ids, the same on all ranks.

        """
        generator = torch.Generator().manual_seed(seed)
        was_training = self.training
        self.eval()
        ids = prompt_ids.to(self.device)
        for _ in range(n):
            window = ids[-self.decoder.config.sequence_length :]
            logits = self._whole_vocabulary(self(window[None])[0, -1:])[0].float().cpu()
            if temperature == 0:
                choice = logits.argmax(keepdim=True)
            else:
                choice = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            choice = choice.to(self.device)
            if dist.is_initialized():
                # Ranks may round differently, and one different token would part their texts for good.
                dist.broadcast(choice, src=0)
            ids = torch.cat((ids, choice))
        self.train(was_training)
        return ids

    def _whole_vocabulary(self, logits: Tensor) -> Tensor:
        """Gather the logits of a vocabulary-parallel head from the tensor-parallel ranks."""
        if logits.shape[-1] == self.decoder.config.vocab_size or self.device_mesh is None:
            return logits
        group = self.device_mesh["tensor_parallel"].get_group()
        slices = [torch.empty_like(logits) for _ in range(dist.get_world_size(group))]
        dist.all_gather(slices, logits.contiguous(), group=group)
        return torch.cat(slices, dim=-1)
