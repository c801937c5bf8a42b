"""A language model with a mixture-of-experts block of one's own, which knows nothing of this package."""

from examples.own_moe_block.model import LanguageModel, OwnMoE

__all__ = ["LanguageModel", "OwnMoE"]
