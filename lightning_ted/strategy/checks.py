"""What is refused, warned of or told about before a run starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.warnings import PossibleUserWarning
from torch import nn, optim
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_ted.adapters import foreign_models, likenesses
from lightning_ted.errors import LayoutError, PlanError, UnsupportedError
from lightning_ted.layout import ParamLayout
from lightning_ted.moe.expert_parallel import expert_parallel_layers
from lightning_ted.optim.probe import update_kind
from lightning_ted.strategy._compat import AVERAGING_CALLBACKS, is_overridden
from lightning_ted.strategy.dtensors import is_parallelized
from lightning_ted.strategy.partition import PartitionOptions
from lightning_ted.tensor_parallel.plan import Style
from lightning_ted.topology import Topology

#: What need not be tried out.
_ELEMENTWISE = {optim.Adam, optim.AdamW, optim.SGD}


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


def refuse_idle_sizes(
    module: nn.Module,
    styles: Mapping[str, Style],
    topology: Topology,
    expert_tensor: int | None,
    sequence_parallel: bool,
) -> None:
    """Refuse sizes that find nothing to cut in a complete model: ranks would do the same work twice.

    Args:
        module: The model, with all of its layers.
        styles: Its tensor-parallel plan.
        topology: What the sizes came to.
        expert_tensor: The expert-tensor size that was asked for.
        sequence_parallel: Whether that was asked for.

    Raises:
        LayoutError: For expert sizes without a MoE layer.
        PlanError: For a tensor-parallel size without a plan and a MoE layer.

    """
    name, layers = type(module).__name__, expert_parallel_layers(module)
    for argument, size in (("expert_parallel_size", topology.expert), ("expert_tensor_parallel_size", expert_tensor)):
        if size is not None and size > 1 and not layers:
            hint = "".join(
                f" '{found.name}' looks like one:\n\n{found.declaration()}" for found in likenesses(module)[:1]
            )
            raise LayoutError(
                f"`{argument}={size}` finds no MoE layer in {name} to share out; leave it at its default.{hint}"
            )
    if topology.tensor == 1 or styles or (is_parallelized(module) and not sequence_parallel):
        return
    plan = f"give {name} or its modules a `tp_plan`, or name what is to be cut in `tensor_parallel_plan`"
    if not layers and not is_parallelized(module):
        raise PlanError(f"`tensor_parallel_size={topology.tensor}` finds nothing to cut in {name}; {plan}.")
    if sequence_parallel:
        raise PlanError(
            f"`sequence_parallel=True` finds no tensor-parallel layers in {name}; {plan}, or set `sequence_parallel=False`."
        )


def refuse_foreign_sequences(module: nn.Module, topology: Topology, sequence_parallel: bool) -> None:
    """Refuse to split the activations of models whose layers are not made for it.

    Raises:
        UnsupportedError: Naming the model.

    """
    names = foreign_models(module) if sequence_parallel and topology.tensor > 1 else []
    if names:
        raise UnsupportedError(
            f"`sequence_parallel=True` splits tokens between the layers of '{names[0]}', a model of transformers, which "
            "computes positions and masks of all of them; set `sequence_parallel=False`."
        )


def warn_of_likenesses(module: nn.Module) -> None:
    """Name blocks that look like mixtures of experts and train as ordinary ones: their experts are on every rank."""
    for likeness in likenesses(module):
        rank_zero_warn(
            f"'{likeness.name}' ({likeness.kind}) looks like a MoE block, and its experts are on every rank. To share them out, "
            f"say where they are, and how many it chooses:\n\n{likeness.declaration()}\n\n"
            "or give its class an adapter with `register_moe_adapter`.",
            category=PossibleUserWarning,
        )


def warn_of_idle_sizes(module: nn.Module, styles: Mapping[str, Style], topology: Topology, tensor: int | str) -> None:
    """Say where sizes do less than one may think; ``tensor`` is the tensor-parallel size that was asked for."""
    name, plan = type(module).__name__, "a `tp_plan` attribute or `tensor_parallel_plan`"
    if topology.tensor > 1 and not styles and not is_parallelized(module):
        rank_zero_warn(
            f"`tensor_parallel_size={topology.tensor}`, but {name} has no tensor-parallel plan: all but its MoE layers is "
            f"replicated. HINT: name what is to be cut by {plan}."
        )
    if tensor == "auto" and topology.tensor == 1 and topology.world_size > 1:
        rank_zero_warn(
            f"`tensor_parallel_size='auto'` is 1: {name} has no tensor-parallel plan with a number of attention heads that "
            f"the devices of a node could share. HINT: give it {plan}, or the size as a number."
        )


def warn_of_idle_dispatch(topology: Topology, options: PartitionOptions, ranks_per_node: int) -> None:
    """Say where a way of sending tokens makes no difference."""
    if options.overlap_chunks > 1 and topology.expert == 1:
        rank_zero_warn(
            f"`moe_overlap_chunks={options.overlap_chunks}` overlaps nothing, because `expert_parallel_size=1` sends no token to "
            "another rank; it only makes the experts' products smaller. HINT: leave it at 1."
        )
    if options.dispatcher == "hierarchical":
        inside, across = topology.node_groups("expert", 0, ranks_per_node)
        if len(inside) == 1 or len(across) == 1:
            where = "one rank in each node" if len(inside) == 1 else "one node"
            rank_zero_warn(
                f"`moe_dispatcher='hierarchical'` sends as 'all_to_all' does, because an expert-parallel group has {where}."
            )


def refuse_averaging_of_rounded_weights(trainer: pl.Trainer, working: Mapping[str, torch.dtype]) -> None:
    """Refuse callbacks that average weights, where the weights that they see are 16-bit copies of the masters.

    Raises:
        UnsupportedError: If there is one.

    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if working and isinstance(callback, AVERAGING_CALLBACKS):
            raise UnsupportedError(
                f"`{type(callback).__name__}` would average the 16-bit weights of `Trainer(precision='{trainer.precision}')`, from "
                "which small changes vanish, and its average would be written over by the masters. Use `precision='32-true'` or "
                "'bf16-true' with it."
            )


def refuse_averaging_of_late_weights(trainer: pl.Trainer) -> None:
    """Refuse callbacks that read weights between steps, where these may be on their way.

    Raises:
        UnsupportedError: If there is one.

    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, AVERAGING_CALLBACKS):
            raise UnsupportedError(
                f"`{type(callback).__name__}` reads the weights between steps, where `overlap_weight_gather=True` leaves them on "
                "their way. Leave `overlap_weight_gather` at its default with it."
            )


def refuse_early_copies(trainer: pl.Trainer, module: pl.LightningModule, topology: Topology) -> None:
    """Refuse callbacks that copied the model before its layers were cut.

    Raises:
        UnsupportedError: If there is one.

    """
    if topology.world_size == topology.data and topology.expert == 1:
        return
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, AVERAGING_CALLBACKS) and is_overridden("configure_model", module):
            raise UnsupportedError(
                f"`{type(callback).__name__}` copies the model before `configure_model` has made and cut its layers. Build "
                f"the layers in `{type(module).__name__}.__init__` to use it with `TEDStrategy`."
            )


def refuse_sparse_gradients(module: nn.Module) -> None:
    """Refuse layers whose gradients are sparse tensors, which are neither bucketed nor clipped.

    Raises:
        UnsupportedError: If there is one that is trained.

    """
    for name, layer in module.named_modules():
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.sparse and layer.weight.requires_grad:
            raise UnsupportedError(
                f"'{name}' is a {type(layer).__name__}(sparse=True), whose sparse gradients `TEDStrategy` cannot average over "
                "the ranks; make it with `sparse=False`."
            )


def replace_parameters(
    optimizers: Sequence[Optimizer], module: pl.LightningModule, names_at_connect: Sequence[tuple[Parameter, str]]
) -> None:
    """Let the optimizers step the module's own parameters: those that it has replaced since they were made, too.

    Args:
        optimizers: The optimizers.
        module: The module.
        names_at_connect: The parameters that it had when it came to the strategy.

    Raises:
        UnsupportedError: If an optimizer holds a parameter that the module has not.

    """
    current = dict(module.named_parameters(remove_duplicate=False))
    own = {id(parameter) for parameter in current.values()}
    old_names = {id(parameter): name for parameter, name in names_at_connect}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for i, parameter in enumerate(group["params"]):
                if id(parameter) not in own:
                    group["params"][i] = _replacement(parameter, type(optimizer), module, old_names, current)


def _replacement(
    parameter: Parameter,
    kind: type[Optimizer],
    module: nn.Module,
    old_names: Mapping[int, str],
    current: Mapping[str, Parameter],
) -> Parameter:
    replacement = current.get(old_names.get(id(parameter), ""))
    if replacement is None:
        raise UnsupportedError(
            f"`{kind.__name__}` holds a parameter of shape {tuple(parameter.shape)} that is not one of "
            f"`{type(module).__name__}`. HINT: make the layers in `__init__`, or the optimizer in "
            "`configure_optimizers`, which runs after `configure_model`."
        )
    return replacement


def needs_whole_parameters(optimizer: Optimizer) -> bool:
    """Whether an optimizer has to see whole parameters, because its update mixes the elements of one.

    Raises:
        UnsupportedError: If it mixes parameters, or if that cannot be found out.

    """
    kind = type(optimizer)
    update = "elementwise" if kind in _ELEMENTWISE else update_kind(optimizer)
    if update in ("coupled", "unknown"):
        why = {
            "coupled": "mixes parameters, or depends on how often it is called (a count or random numbers of its own)",
            "unknown": "could not be tried out on small matrices (does it want a closure, or sparse gradients?)",
        }[update]
        raise UnsupportedError(
            f"`{kind.__name__}` cannot be used with `TEDStrategy`, which shares out what is stepped over ranks and tiles: its "
            f"update {why}. Use an elementwise optimizer, such as `AdamW` or `SGD`."
        )
    return update == "parameterwise"


def warn_of_unstepped(module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Say which trained parameters no optimizer steps: their gradients stay this rank's own."""
    stepped = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    left = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in stepped]
    if left and optimizers:
        rank_zero_warn(
            f"{len(left)} parameters require gradients, but no optimizer steps them ('{left[0]}', ...), so their gradients are "
            "not averaged over the ranks. HINT: freeze them by `requires_grad_(False)`.",
            category=PossibleUserWarning,
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
