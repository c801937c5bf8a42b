"""Starts the other processes of this node, after everything that can be checked without them was checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins import ClusterEnvironment
from typing_extensions import override

from lightning_ted.strategy._compat import SubprocessScriptLauncher


class CheckingLauncher(SubprocessScriptLauncher):
    """Lightning's launcher of script processes, which first checks the parallel sizes.

    Under torchrun or SLURM it starts nothing; it then only checks, and sets the number of threads.

    Args:
        cluster_environment: Where ranks and addresses come from.
        num_processes: Processes on this node.
        num_nodes: Number of nodes.
        check: Called with the LightningModule that is about to run (``None`` if unknown), and with the ``Trainer`` and all that
            its method was called with; raises if the sizes do not fit.

    """

    def __init__(
        self,
        cluster_environment: ClusterEnvironment,
        num_processes: int,
        num_nodes: int,
        check: Callable[[pl.LightningModule | None, Sequence[Any]], object],
    ) -> None:
        super().__init__(cluster_environment, num_processes, num_nodes)
        self._check = check

    @override
    def launch(self, function: Callable, *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        module = next((arg for arg in args if isinstance(arg, pl.LightningModule)), None)
        self._check(module, (trainer, *args, *kwargs.values()))
        return super().launch(function, *args, trainer=trainer, **kwargs)
