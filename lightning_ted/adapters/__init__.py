"""Foreign MoE blocks, tensor-parallel plans and adapters: those of Hugging Face's transformers and peft, and a user's own."""

from lightning_ted.adapters.adoption import adopt, foreign_models, foreign_plan, initialisers, stacked_experts
from lightning_ted.adapters.likeness import likenesses
from lightning_ted.adapters.peft import adapted_styles, check_adapters
from lightning_ted.adapters.pretrained import from_pretrained, load_pretrained
from lightning_ted.adapters.registry import register_moe_adapter
from lightning_ted.adapters.spec import MoESpec

__all__ = [
    "MoESpec",
    "adapted_styles",
    "adopt",
    "check_adapters",
    "foreign_models",
    "foreign_plan",
    "from_pretrained",
    "initialisers",
    "likenesses",
    "load_pretrained",
    "register_moe_adapter",
    "stacked_experts",
]
