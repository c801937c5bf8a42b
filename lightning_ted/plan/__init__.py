"""Arithmetic about a model on a layout, from sizes alone: what it sends, before anything runs. No torch."""
