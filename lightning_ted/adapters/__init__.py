"""Foreign MoE blocks and tensor-parallel plans: those of Hugging Face's transformers, and a user's own."""

from lightning_ted.adapters.adoption import adopt, foreign_models, foreign_plan, initialisers
from lightning_ted.adapters.pretrained import from_pretrained, load_pretrained
from lightning_ted.adapters.registry import register_moe_adapter

__all__ = [
    "adopt",
    "foreign_models",
    "foreign_plan",
    "from_pretrained",
    "initialisers",
    "load_pretrained",
    "register_moe_adapter",
]
