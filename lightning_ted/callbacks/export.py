"""Models of Hugging Face's transformers written out of a run, for ``from_pretrained``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_ted.adapters.export import described_models
from lightning_ted.checkpoint.shards import bytes_of
from lightning_ted.errors import TEDError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, None: None}


class HuggingFaceExport(Callback):
    """Write the model that a LightningModule holds as Hugging Face's library does, when training ends and on the way.

    Each rank writes some of the layers (see :meth:`TEDStrategy.save_pretrained`), and ``from_pretrained`` reads what they have
    written.

    Args:
        dirpath: A folder. What an earlier export has written there is replaced once the new one is whole.
        every_n_epochs: After how many epochs to write; None for at the end alone.
        model_name: Under which attribute the LightningModule holds the model, if it holds several.
        dtype: Of floating-point weights; None leaves those that are trained (in mixed precision, the float32 ones).
        max_shard_size: How large a file may be, such as 500MB or 5GB.

    Raises:
        TEDError: If an argument is none of these; when training begins, under another strategy and for a module without such a
            model.

    """

    def __init__(
        self,
        dirpath: str | Path,
        every_n_epochs: int | None = None,
        model_name: str | None = None,
        dtype: Literal["fp32", "bf16"] | None = None,
        max_shard_size: str = "5GB",
    ) -> None:
        if every_n_epochs is not None and every_n_epochs < 1:
            raise TEDError(f"`every_n_epochs={every_n_epochs}` must be at least 1, or None.")
        if dtype not in _DTYPES:
            raise TEDError(f"`dtype={dtype!r}` must be 'fp32', 'bf16' or None.")
        bytes_of(max_shard_size)
        self.dirpath, self.every_n_epochs, self.model_name = Path(dirpath), every_n_epochs, model_name
        self.dtype, self.max_shard_size = _DTYPES[dtype], max_shard_size

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not hasattr(trainer.strategy, "save_pretrained"):
            raise TEDError(
                "`HuggingFaceExport` needs `Trainer(strategy=TEDStrategy(...))`; elsewhere, call `save_pretrained`."
            )
        names = [model["name"] for model in described_models(pl_module)]
        if (len(names) != 1 and self.model_name is None) or (
            self.model_name is not None and self.model_name not in names
        ):
            raise TEDError(
                f"`HuggingFaceExport(model_name={self.model_name!r})` fits no model of {type(pl_module).__name__}, which holds "
                f"{', '.join(map(repr, names)) or 'none of transformers'}."
            )

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._write(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            strategy: Any = trainer.strategy
            strategy.save_pretrained(self.dirpath, self.model_name, self.dtype, self.max_shard_size)
