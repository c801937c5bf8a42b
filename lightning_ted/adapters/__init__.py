"""Foreign MoE blocks and tensor-parallel plans: those of Hugging Face's transformers, and a user's own."""

from lightning_ted.adapters.adoption import adopt, foreign_plan

__all__ = ["adopt", "foreign_plan"]
