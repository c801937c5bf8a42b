"""The command ``lightning-ted verify``: of a configuration for ``fit``, the first batch under the layout and in one process."""

from __future__ import annotations

import json as json_format
import sys
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.console import Console
from typing_extensions import override

from lightning_ted.errors import VerificationError
from lightning_ted.strategy.ted import TEDStrategy
from lightning_ted.verify.measure import batch_size, first_samples
from lightning_ted.verify.report import WIDTH, VerificationReport
from lightning_ted.verify.run import find_topology

#: What of the Trainer a step depends on.
_OF_A_STEP = ("gradient_clip_val", "gradient_clip_algorithm")
#: Settings of `fit` alone, which a configuration for it may have.
_OF_FIT = ("ckpt_path", "weights_only")


def verify_config(
    processes: int | None = None,
    samples: int | None = None,
    tolerance: float = 1e-5,
    seed: int = 0,
    timeout: float = 600.0,
    json: bool = False,
) -> None:
    """Show that the model of a configuration for ``fit`` computes under its layout what it computes in one process.

    Args:
        processes: Local CPU processes of the layout. Without it, as few as its degrees need, with two data ranks.
        samples: Samples of the first training batch to take, for all data ranks together. Without it, as many as they can share.
        tolerance: Relative, of loss, outputs, gradients and norms.
        seed: Of the noise that weights get, because constants hide errors.
        timeout: Seconds that a run may take.
        json: Print JSON.

    """


class _VerifyCLI(LightningCLI):
    """Takes what ``fit`` does, and makes a Trainer that this machine can have."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_function_arguments(verify_config, "verify")
        for name in _OF_FIT:
            parser.add_argument(f"--{name}", type=Any, default=None, help="Of `fit`; not used here.")

    @override
    def before_instantiate_classes(self) -> None:
        trainer = self.config.trainer
        here = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "precision": "32-true", "logger": False}
        here |= {"callbacks": None, "profiler": None, "plugins": None, "enable_checkpointing": False}
        here |= {"enable_progress_bar": False, "enable_model_summary": False}
        for name, value in here.items():
            trainer[name] = value


def run() -> int:
    """Run the command of this process's command line; its exit status, which is 1 if something differs.

    Raises:
        TEDError: If the module cannot be run so.

    """
    sys.argv[1:] = map(_spelled, sys.argv[2:])
    cli = _VerifyCLI(
        run=False,
        save_config_callback=None,
        parser_kwargs={"prog": "lightning-ted verify", "description": (verify_config.__doc__ or "").partition("\n")[0]},
    )
    options, trainer = cli.config.verify, cli.trainer
    if not isinstance(trainer.strategy, TEDStrategy):
        raise VerificationError(
            "The configuration has no `trainer.strategy` of this package; there is nothing to verify."
        )
    batch = _first_batch(cli.model, cli.datamodule, trainer)
    topology = find_topology(cli.model, trainer.strategy.again, options.processes, options.timeout)
    report = trainer.strategy.verify(
        cli.model,
        _some(batch, options.samples, topology.data),
        processes=topology.world_size,
        tolerance=options.tolerance,
        seed=options.seed,
        timeout=options.timeout,
        trainer_options={name: cli.config.trainer[name] for name in _OF_A_STEP},
    )
    _show(report, options.json)
    return 0 if report.ok else 1


def _spelled(argument: str) -> str:
    """``--processes`` is ``--verify.processes``."""
    name, equals, value = argument.partition("=")
    own = name.removeprefix("--").replace("-", "_")
    if name.startswith("--") and own in verify_config.__annotations__ and own != "return":
        # A flag needs no value.
        return f"--verify.{own}{equals}{value}" if own != "json" or equals else "--verify.json=true"
    return argument


def _first_batch(module: pl.LightningModule, data: pl.LightningDataModule | None, trainer: pl.Trainer) -> Any:
    source: Any = module if data is None else data
    source.trainer = trainer
    if data is not None:
        data.prepare_data()
        data.setup("fit")
    loader = source.train_dataloader()
    batch = next(iter(loader))
    return source.on_after_batch_transfer(source.on_before_batch_transfer(batch, 0), 0)


def _some(batch: Any, samples: int | None, data: int) -> Any:
    """The first samples of a batch: as many as asked for, or as many as so many data ranks can share."""
    size = batch_size(batch)
    wanted = size // data * data if samples is None else samples
    if not 0 < wanted <= size or wanted % data:
        raise VerificationError(
            f"`--samples {samples}` does not fit: the first batch has {size} samples, to be shared by {data} data ranks."
            if samples is not None
            else f"The first batch has {size} samples, fewer than the {data} data ranks; raise the batch size."
        )
    return first_samples(batch, size, wanted)


def _show(report: VerificationReport, json: bool) -> None:
    if json:
        print(json_format.dumps(report.as_dict(), indent=2))
    else:
        console = Console()
        report.print(console if console.is_terminal else Console(width=WIDTH))
