"""A callback that shows what a trained decoder has learned."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only


class SampleContinuation(L.Callback):
    """After training, let the model continue a prompt and set its loss beside the entropy of the text.

    Args:
        prompt: The text to continue.
        num_bytes: Length of the continuation, in bytes.
        temperature: Divisor of the logits; 0 takes the likeliest byte.
        seed: Of the sampling.
        path: Where the text is written; None for ``sample.txt`` in the Trainer's log directory.

    """

    def __init__(
        self,
        prompt: str = "def ",
        num_bytes: int = 200,
        temperature: float = 0.8,
        seed: int = 0,
        path: str | None = None,
    ) -> None:
        self.prompt = prompt
        self.num_bytes = num_bytes
        self.temperature = temperature
        self.seed = seed
        self.path = path

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        prompt = torch.tensor(list(self.prompt.encode()))
        # Every rank takes part: the model's shards cannot run alone.
        ids = pl_module.generate(prompt, self.num_bytes, temperature=self.temperature, seed=self.seed)
        text = bytes(ids.tolist()).decode(errors="replace")
        directory = trainer.log_dir or trainer.default_root_dir
        self._show(text, Path(self.path) if self.path else Path(directory) / "sample.txt")
        self._compare(trainer)

    @rank_zero_only
    def _show(self, text: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"\nSample (also in {path}):\n{'-' * 80}\n{text}\n{'-' * 80}")

    @rank_zero_only
    def _compare(self, trainer: L.Trainer) -> None:
        loss = trainer.callback_metrics.get("val_loss")
        entropy = getattr(trainer.datamodule, "unigram_entropy", None)
        if loss is not None and entropy is not None:
            print(f"Validation loss {loss:.3f} nats per byte; unigram entropy of the validation bytes {entropy:.3f}.")
