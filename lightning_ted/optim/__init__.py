"""Gradients and optimizers. They know layouts, never modules."""
