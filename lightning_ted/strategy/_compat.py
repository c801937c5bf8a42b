"""Every private name of Lightning that this package needs, in one place, held by an import test."""

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
from lightning.fabric.utilities.optimizer import _optimizer_to_device as optimizer_to_device
from lightning.fabric.utilities.optimizer import _optimizers_to_device as optimizers_to_device
from lightning.fabric.utilities.seed import (
    _collect_rng_states as collect_rng_states,
)
from lightning.fabric.utilities.seed import (
    _set_rng_states as set_rng_states,
)
from lightning.fabric.utilities.seed import pl_worker_init_function, reset_seed
from lightning.pytorch.strategies.launchers.subprocess_script import (
    _SubprocessScriptLauncher as SubprocessScriptLauncher,
)
from lightning.pytorch.strategies.strategy import TBroadcast
from lightning.pytorch.utilities.exceptions import _augment_message as augment_message
from lightning.pytorch.utilities.model_helpers import is_overridden

__all__ = [
    "SubprocessScriptLauncher",
    "TBroadcast",
    "augment_message",
    "collect_rng_states",
    "default_backend_for_device",
    "default_pg_timeout",
    "distributed_is_initialized",
    "init_dist_connection",
    "is_overridden",
    "optimizer_to_device",
    "optimizers_to_device",
    "pl_worker_init_function",
    "reset_seed",
    "set_rng_states",
]
