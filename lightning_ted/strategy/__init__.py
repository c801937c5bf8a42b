"""The Lightning side: what a ``Trainer`` calls, and in which order.

Nothing is imported here, so that ``import lightning_ted`` stays light; the strategy lives in
``lightning_ted.strategy.ted``.
"""
