"""A user's script: trains a small model and writes a checkpoint. ``python launch_script.py OUT DEVICES NODES [TENSOR]``."""

import sys

import lightning as L
from torch.utils.data import DataLoader

from lightning_ted import TEDStrategy
from tests.support.runs import Numbered, Toy


def main() -> None:
    out, devices, nodes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    tensor = int(sys.argv[4]) if len(sys.argv) > 4 else 1
    L.seed_everything(5)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        num_nodes=nodes,
        strategy=TEDStrategy(tensor_parallel_size=tensor, expert_parallel_size=2, save_distributed_checkpoint=False),
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Toy(), DataLoader(Numbered(), batch_size=4))
    trainer.save_checkpoint(out)


if __name__ == "__main__":
    main()
