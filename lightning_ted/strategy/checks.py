"""What is refused, warned of or told about before a run starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import lightning.pytorch as pl
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_ted.errors import UnsupportedError
from lightning_ted.layout import ParamLayout
from lightning_ted.strategy._compat import is_overridden
from lightning_ted.topology import Topology

#: Optimizers that mix the elements of a parameter, so that stepping its parts is not stepping the parameter.
_NOT_ELEMENTWISE = ("LBFGS", "Adafactor", "Muon", "Shampoo", "SOAP", "LAMB", "Lamb", "LARS")


def warn_of_overrides(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Point at hooks and settings that work on one process and are easily wrong on parts of parameters."""
    if is_overridden("configure_gradient_clipping", module):
        rank_zero_warn(
            f"`{type(module).__name__}.configure_gradient_clipping` is overridden. With `TEDStrategy`, clip by "
            "`self.clip_gradients(optimizer, ...)`: `torch.nn.utils.clip_grad_norm_` sees this rank's parts of the "
            "parameters only, and each rank would clip by another norm."
        )
    if getattr(trainer.strategy.cluster_environment, "auto_requeue", False):  # type: ignore[attr-defined]
        rank_zero_warn(
            "SLURM's automatic requeueing saves a checkpoint from a signal handler, wherever the ranks stand at that "
            "moment; saving is a collective and may hang. HINT: use `plugins=[SLURMEnvironment(auto_requeue=False)]` and "
            "save periodically with `ModelCheckpoint`."
        )


def refuse_early_copies(trainer: pl.Trainer, module: pl.LightningModule, topology: Topology) -> None:
    """Refuse callbacks that copied the model before its layers were cut.

    Raises:
        UnsupportedError: If there is one.

    """
    if topology.world_size == topology.data and topology.expert == 1:
        return
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging) and is_overridden("configure_model", module):
            raise UnsupportedError(
                f"`{type(callback).__name__}` copies the model before `configure_model` has made and cut its layers. Build "
                f"the layers in `{type(module).__name__}.__init__` to use it with `TEDStrategy`."
            )


def check_optimizers(
    optimizers: Sequence[Optimizer],
    module: pl.LightningModule,
    names_at_connect: Sequence[tuple[Parameter, str]],
    is_cut: Callable[[Parameter], bool],
) -> None:
    """See that the optimizers step the module's own parameters, and may step parts of them.

    A parameter that the module has replaced since the optimizer was made is replaced in the optimizer too.

    Raises:
        UnsupportedError: If an optimizer holds a parameter that the module has not, or mixes the elements of one that is
            cut.

    """
    current = dict(module.named_parameters(remove_duplicate=False))
    known = {id(parameter) for parameter in current.values()}
    old_names = {id(parameter): name for parameter, name in names_at_connect}
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        for group in optimizer.param_groups:
            for i, parameter in enumerate(group["params"]):
                if id(parameter) not in known:
                    replacement = current.get(old_names.get(id(parameter), ""))
                    if replacement is None:
                        raise UnsupportedError(
                            f"`{kind}` holds a parameter of shape {tuple(parameter.shape)} that is not one of "
                            f"`{type(module).__name__}`. HINT: make the layers in `__init__`, or the optimizer in "
                            "`configure_optimizers`, which runs after `configure_model`."
                        )
                    group["params"][i] = parameter = replacement
                if kind in _NOT_ELEMENTWISE and is_cut(parameter):
                    name = next(name for name, p in current.items() if p is parameter)
                    raise UnsupportedError(
                        f"`{kind}` cannot step '{name}', of which each rank holds a part: its update mixes the elements of "
                        "a parameter. Use an elementwise optimizer, such as `AdamW` or `SGD`."
                    )


def describe(module: pl.LightningModule, layouts: dict[str, ParamLayout], topology: Topology) -> str:
    """One line on the layout and the number of parameters, which Lightning's summary counts per rank."""
    local, whole = 0, 0
    for name, parameter in module.named_parameters():
        local += parameter.numel()
        whole += prod(layouts[name].global_shape) if name in layouts else parameter.numel()
    return (
        f"TEDStrategy: {topology.world_size} ranks = tensor {topology.tensor} x data {topology.data} = "
        f"expert-tensor {topology.expert_tensor} x expert {topology.expert} x expert-data {topology.expert_data}; "
        f"{whole:,} parameters, {local:,} on this rank"
    )
