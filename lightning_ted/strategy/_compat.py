"""Every private name of Lightning that this package needs, and what differs between its versions, in one place."""

from inspect import signature
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks as _callbacks
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.distributed import (
    _distributed_is_initialized as distributed_is_initialized,
)
from lightning.fabric.utilities.distributed import (
    _get_default_process_group_backend_for_device as default_backend_for_device,
)
from lightning.fabric.utilities.distributed import (
    _init_dist_connection as init_dist_connection,
)
from lightning.fabric.utilities.seed import (
    _collect_rng_states as collect_rng_states,
)
from lightning.fabric.utilities.seed import (
    _set_rng_states as set_rng_states,
)
from lightning.fabric.utilities.seed import pl_worker_init_function, reset_seed
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers.subprocess_script import (
    _SubprocessScriptLauncher as SubprocessScriptLauncher,
)
from lightning.pytorch.strategies.strategy import Strategy, TBroadcast
from lightning.pytorch.utilities.model_helpers import is_overridden

#: Callbacks that copy the model in their ``setup``; Lightning 2.5 has not got all of them.
AVERAGING_CALLBACKS: tuple[type, ...] = tuple(
    getattr(_callbacks, name) for name in ("WeightAveraging", "StochasticWeightAveraging") if hasattr(_callbacks, name)
)


def begins_epoch(trainer: Trainer) -> bool:
    """Whether the first thing that a resumed run does is an epoch; else it goes on inside one, or ends one."""
    loop = trainer.fit_loop
    if not getattr(loop, "restarted_mid_epoch", False):
        return True
    # Behind the last batch, before the evaluation: Lightning takes the epoch for ended.
    return loop.epoch_loop.batch_progress.is_last_batch and loop.epoch_loop.restarted_on_train_batch_end


def checkpoint_folders(trainer: Trainer) -> list[Path]:
    """Where ``ckpt_path="last"`` is looked for."""
    savers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, _callbacks.ModelCheckpoint)]
    folders = [str(saver._ModelCheckpoint__resolve_ckpt_dir(trainer)) for saver in savers]  # type: ignore[attr-defined]
    return [Path(folder) for folder in folders if is_local(get_filesystem(folder))]


def is_local(filesystem: Any) -> bool:
    """Whether a file system of fsspec's is the machine's own."""
    return isinstance(filesystem, LocalFileSystem)


def reading_options(weights_only: bool | None) -> dict[str, Any]:
    """What ``Strategy.load_checkpoint`` is given besides the path; before Lightning 2.6 it took nothing."""
    known = "weights_only" in signature(Strategy.load_checkpoint).parameters
    return {"weights_only": weights_only} if known else {}


__all__ = [
    "AVERAGING_CALLBACKS",
    "SubprocessScriptLauncher",
    "TBroadcast",
    "begins_epoch",
    "checkpoint_folders",
    "collect_rng_states",
    "default_backend_for_device",
    "default_pg_timeout",
    "distributed_is_initialized",
    "init_dist_connection",
    "is_local",
    "is_overridden",
    "pl_worker_init_function",
    "reading_options",
    "reset_seed",
    "set_rng_states",
]
