"""Every private name of Lightning that this package needs, and what differs between its versions, in one place."""

from pathlib import Path

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
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
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies.launchers.subprocess_script import (
    _SubprocessScriptLauncher as SubprocessScriptLauncher,
)
from lightning.pytorch.strategies.strategy import TBroadcast
from lightning.pytorch.utilities.model_helpers import is_overridden

#: Callbacks that copy the model in their ``setup``.
AVERAGING_CALLBACKS = (WeightAveraging, StochasticWeightAveraging)


def begins_epoch(trainer: Trainer) -> bool:
    """Whether the first thing that a resumed run does is an epoch; else it goes on inside one, or ends one."""
    loop = trainer.fit_loop
    if not loop.restarted_mid_epoch:
        return True
    # Behind the last batch, before the evaluation: Lightning takes the epoch for ended.
    return loop.epoch_loop.batch_progress.is_last_batch and loop.epoch_loop.restarted_on_train_batch_end


def checkpoint_folders(trainer: Trainer) -> list[Path]:
    """Where ``ckpt_path="last"`` is looked for."""
    savers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    folders = (local_path(saver._ModelCheckpoint__resolve_ckpt_dir(trainer)) for saver in savers)  # type: ignore[attr-defined]
    return [folder for folder in folders if folder is not None]


def local_path(path: object) -> Path | None:
    """A path of the machine's own file systems as such; None if it is one of an object store or the like."""
    filesystem, stripped = url_to_fs(str(path))
    return Path(stripped) if isinstance(filesystem, LocalFileSystem) else None


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
    "is_overridden",
    "local_path",
    "pl_worker_init_function",
    "reset_seed",
    "set_rng_states",
]
