"""Fine-tune a Mixtral from safetensors with LoRA on attention and on experts, and export the adapters.

``python -m examples.huggingface_lora.train`` makes a small Mixtral first, as nothing is downloaded; ``--base`` takes yours.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_only
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig

from examples.decoder.text import TextDataModule
from lightning_ted import TEDStrategy, from_pretrained
from lightning_ted.callbacks import HuggingFaceExport

SEQUENCE = 64


@rank_zero_only
def make_base(folder: Path) -> None:
    """A small Mixtral over bytes, in several files of safetensors."""
    if (folder / "config.json").exists():
        return
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=SEQUENCE,
        bos_token_id=0,
        eos_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="500KB")


def adapters() -> LoraConfig:
    return LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        task_type="CAUSAL_LM",
    )


class FineTuning(L.LightningModule):
    """A language model with adapters; each rank reads its part of the base.

    Args:
        base: Folder of the base model.
        learning_rate: Of the adapters.

    """

    def __init__(self, base: str, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model: Any = None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = get_peft_model(from_pretrained(AutoModelForCausalLM, self.hparams["base"]), adapters())

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits = self.model(input_ids=batch[0], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), batch[1].flatten())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=self.hparams["learning_rate"])


@torch.no_grad()
def loss_of(model: Any, data: TextDataModule, batches: int) -> float:
    """What plain transformers and peft say of a model, in one process."""
    losses = []
    for number, (inputs, targets) in enumerate(data.val_dataloader()):
        if number == batches:
            break
        logits = model.eval()(input_ids=inputs, use_cache=False).logits
        losses.append(float(F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())))
    return sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/huggingface_lora"))
    parser.add_argument("--base", type=Path, help="folder of a Mixtral; one is made if there is none")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--devices", type=int, default=4)
    args = parser.parse_args()
    base = args.base or args.folder / "base"
    make_base(base)
    data = TextDataModule(sequence_length=SEQUENCE, batch_size=16, num_bytes=1_000_000)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=args.devices,
        strategy=TEDStrategy(tensor_parallel_size=2, expert_parallel_size=2, exclude_frozen_parameters=True),
        max_steps=args.steps,
        limit_val_batches=4,
        gradient_clip_val=1.0,
        callbacks=[HuggingFaceExport(args.folder / "adapters")],
        default_root_dir=args.folder,
    )
    trainer.fit(FineTuning(str(base)), data)
    if trainer.is_global_zero:
        plain = AutoModelForCausalLM.from_pretrained(base)
        before = loss_of(plain, data, 4)
        adapted = PeftModel.from_pretrained(plain, args.folder / "adapters")
        after = loss_of(adapted, data, 4)
        adapted.merge_and_unload().save_pretrained(args.folder / "merged")
        merged = loss_of(AutoModelForCausalLM.from_pretrained(args.folder / "merged"), data, 4)
        print(f"validation loss: base {before:.3f}, with the exported adapters {after:.3f}, merged {merged:.3f}")


if __name__ == "__main__":
    main()
