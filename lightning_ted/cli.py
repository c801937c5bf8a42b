"""The command ``lightning-ted``: Lightning's CLI with the classes of this package at hand.

``fit``, ``validate``, ``test`` and ``predict`` read the model, the data, the Trainer and its strategy from YAML and
from the command line::

    lightning-ted fit --config configs/quickstart.yaml --trainer.max_steps 100

This module imports nothing heavy, so that importing it is free; :func:`main` does.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line of this process, which strategies repeat for the processes that they start.

    Raises:
        SystemExit: With a message and no traceback, for settings that this package refuses.

    """
    # A console script finds modules beside itself, not in the working directory, where the user's model is;
    # `python -m lightning_ted` does, and both should take the same YAML.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())

    from lightning.pytorch.cli import LightningCLI

    import lightning_ted  # noqa: F401  (registers the strategy "ted")
    from lightning_ted.errors import TEDError

    try:
        LightningCLI(
            parser_kwargs={"prog": "lightning-ted", "description": "Train mixture-of-experts models under TED."},
            # The configuration is written into the log directory, which runs without a versioned logger share.
            save_config_kwargs={"overwrite": True},
        )
    except TEDError as error:
        raise SystemExit(f"lightning-ted: error: {error}") from error
