"""Foreign MoE blocks, tensor-parallel plans and adapters: those of Hugging Face's transformers and peft, and a user's own."""

from lightning_ted.adapters.adoption import adopt, foreign_models, foreign_plan, initialisers
from lightning_ted.adapters.peft import adapted_styles, check_adapters
from lightning_ted.adapters.pretrained import from_pretrained, load_pretrained
from lightning_ted.adapters.registry import register_moe_adapter

__all__ = [
    "adapted_styles",
    "adopt",
    "check_adapters",
    "foreign_models",
    "foreign_plan",
    "from_pretrained",
    "initialisers",
    "load_pretrained",
    "register_moe_adapter",
]
