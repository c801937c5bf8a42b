"""The command ``lightning-ted``: Lightning's CLI with the classes of this package at hand, and commands for checkpoints.

``fit``, ``validate``, ``test`` and ``predict`` read the model, the data, the Trainer and its strategy from YAML and
from the command line::

    lightning-ted fit --config configs/quickstart.yaml --trainer.max_steps 100

``verify`` takes the settings of ``fit``, and shows that its layout computes what one process does::

    lightning-ted verify --config configs/quickstart.yaml

``convert`` and ``inspect`` take the arguments of functions, and their help from the docstrings::

    lightning-ted inspect lightning_logs/version_0/checkpoints/last.ckpt
    lightning-ted convert lightning_logs/version_0/checkpoints/last.ckpt weights --to safetensors --dtype bf16

This module imports nothing heavy, so that importing it is free; :func:`main` does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def main() -> None:
    """Run the command line of this process, which strategies repeat for the processes that they start.

    Raises:
        SystemExit: With a message and no traceback, for settings and checkpoints that this package refuses.

    """
    from lightning_ted.errors import TEDError

    try:
        if sys.argv[1:2] == ["verify"]:
            _run_verify()
        elif sys.argv[1:2] in (["convert"], ["inspect"]):
            _run_command(sys.argv[1], sys.argv[2:])
        else:
            _run_lightning()
    except TEDError as error:
        raise SystemExit(f"lightning-ted: error: {error}") from error


def _find_users_modules() -> None:
    # A console script finds modules beside itself, not in the working directory, where the user's model is;
    # `python -m lightning_ted` does, and both should take the same YAML.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def _run_verify() -> None:
    _find_users_modules()
    from lightning_ted.verify.command import run

    raise SystemExit(run())


def _run_lightning() -> None:
    _find_users_modules()
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    import lightning_ted  # noqa: F401  (registers the strategy "ted")

    class Parser(LightningArgumentParser):
        """Knows of the commands that are none of the Trainer's."""

        def add_subcommands(self, *args: Any, **kwargs: Any) -> Any:
            subcommands = super().add_subcommands(*args, **kwargs)
            for name in ("verify", "convert", "inspect"):
                parser = _parser_of(name)
                subcommands.add_subcommand(name, parser, help=parser.description)
            return subcommands

    LightningCLI(
        parser_kwargs={"prog": "lightning-ted", "description": "Train mixture-of-experts models under TED."},
        parser_class=Parser,
        # The configuration is written into the log directory, which runs without a versioned logger share.
        save_config_kwargs={"overwrite": True},
    )


# -- commands for checkpoints ------------------------------------------------------------------------------------------------


def _function_of(name: str) -> Callable[..., None]:
    if name == "convert":
        from lightning_ted.convert import convert

        return convert
    if name == "verify":
        from lightning_ted.verify.command import verify_config

        return verify_config
    from lightning_ted.inspection import inspect

    return inspect


def _parser_of(name: str) -> ArgumentParser:
    """The arguments of a command, spelled ``--max-shard-size``, with flags that take no value."""
    from jsonargparse import ArgumentParser

    class Parser(ArgumentParser):
        def add_argument(self, *args: Any, **kwargs: Any) -> Any:
            if "type" in kwargs:
                args = tuple(name.replace("_", "-") if name.startswith("--") else name for name in args)
            if kwargs.get("type") is bool:
                kwargs = {"action": "store_true", "help": kwargs["help"]}
            return super().add_argument(*args, **kwargs)

    function = _function_of(name)
    first_line = (function.__doc__ or "").partition("\n")[0]
    parser = Parser(prog=f"lightning-ted {name}", description=first_line)
    parser.add_function_arguments(function, as_group=False, as_positional=True)
    return parser


def _run_command(name: str, arguments: list[str]) -> None:
    chosen = _parser_of(name).parse_args(arguments)
    _function_of(name)(**chosen.as_dict())
