"""Every private name of Lightning that this package needs, and what differs between its versions, in one place."""

from inspect import signature
from typing import Any

import lightning.pytorch.callbacks as _callbacks
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
from lightning.pytorch.strategies.launchers.subprocess_script import (
    _SubprocessScriptLauncher as SubprocessScriptLauncher,
)
from lightning.pytorch.strategies.strategy import Strategy, TBroadcast
from lightning.pytorch.utilities.model_helpers import is_overridden

#: Callbacks that copy the model in their ``setup``; Lightning 2.5 has not got all of them.
AVERAGING_CALLBACKS: tuple[type, ...] = tuple(
    getattr(_callbacks, name) for name in ("WeightAveraging", "StochasticWeightAveraging") if hasattr(_callbacks, name)
)


def reading_options(weights_only: bool | None) -> dict[str, Any]:
    """What ``Strategy.load_checkpoint`` is given besides the path; before Lightning 2.6 it took nothing."""
    known = "weights_only" in signature(Strategy.load_checkpoint).parameters
    return {"weights_only": weights_only} if known else {}


__all__ = [
    "AVERAGING_CALLBACKS",
    "SubprocessScriptLauncher",
    "TBroadcast",
    "collect_rng_states",
    "default_backend_for_device",
    "default_pg_timeout",
    "distributed_is_initialized",
    "init_dist_connection",
    "is_overridden",
    "pl_worker_init_function",
    "reading_options",
    "reset_seed",
    "set_rng_states",
]
