"""From the strategy's arguments to a topology, checked against the model before any process is started."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Literal

from torch import nn

from lightning_ted.adapters import MoESpec, adapted_styles, adopt, check_adapters, foreign_plan
from lightning_ted.errors import LayoutError, PlanError
from lightning_ted.moe.expert_parallel import expert_parallel_layers
from lightning_ted.tensor_parallel.builtin import builtin_styles
from lightning_ted.tensor_parallel.check import check_plan, head_counts, planned_cuts
from lightning_ted.tensor_parallel.plan import Style, collect_plan, expand_plan
from lightning_ted.topology import RankOrder, Topology, divisors

Size = int | Literal["auto"]


def module_styles(
    module: nn.Module, plan: Literal["auto"] | Mapping[str, str], complete: bool = True
) -> dict[str, Style]:
    """The plan for a module, matched with its names; where ``plan`` is "auto", its own and that of torch's layers in it.

    Raises:
        PlanError: If a style is unknown, or a pattern matches nothing, or a part of a MoE layer other than its shared expert.
        UnsupportedError: If layers have got adapters after the plan was applied.

    """
    layers = expert_parallel_layers(module)
    if plan == "auto":
        # A foreign plan names also what a model of that kind may have.
        styles = expand_plan(module, foreign_plan(module), complete=False)
        styles |= expand_plan(module, collect_plan(module), complete)
        styles = builtin_styles(module, named=styles, closed=layers) | styles
    else:
        styles = expand_plan(module, plan, complete)
    styles = adapted_styles(module, styles)
    for prefix, layer in layers.items():
        ordinary = tuple(f"{prefix}.{shared}." for shared in layer.shared_expert_names())
        for name in styles:
            if f"{name}.".startswith(f"{prefix}.") and not f"{name}.".startswith(ordinary):
                raise PlanError(
                    f"`tensor_parallel_plan` names '{name}', a part of MoE layer '{prefix}', which `expert_tensor_parallel_size` "
                    "cuts; leave it out of the plan."
                )
    return styles


def resolve_sizes(
    module: nn.Module | None,
    world_size: int,
    devices_per_node: int,
    tensor: Size,
    expert: Size,
    expert_tensor: int | None,
    order: RankOrder,
    plan: Literal["auto"] | Mapping[str, str],
    complete: bool = True,
    specs: Sequence[MoESpec] = (),
) -> Topology:
    """The topology that the arguments ask for.

    Args:
        module: The model, as far as it has been built; None where there is none yet.
        world_size: Number of ranks.
        devices_per_node: Ranks on one node, which an automatic tensor-parallel degree does not leave.
        tensor: Tensor-parallel degree.
        expert: Expert-parallel degree.
        expert_tensor: Expert-tensor degree; None for ``tensor``.
        order: Rank order.
        plan: Tensor-parallel plan.
        complete: False while the model has layers still to build.
        specs: What is said of MoE blocks of the user's own.

    Raises:
        LayoutError, PlanError: If a size does not fit the world or the model.
        SpecError: If a spec does not fit its block.
        UnsupportedError: If the model has experts or adapters that cannot be cut.

    """
    if module is not None:
        adopt(module, specs, complete)
    styles = {} if module is None else module_styles(module, plan, complete)
    if module is not None and tensor != 1:
        check_adapters(module, styles)
    if tensor == "auto":
        largest = _largest_tensor(module, styles, math.gcd(world_size, devices_per_node))
        for degree in reversed(divisors(largest)[1:]):
            with suppress(LayoutError):  # the experts may need a smaller one
                return _topology(module, world_size, degree, expert, expert_tensor, order)
        tensor = 1
    topology = _topology(module, world_size, tensor, expert, expert_tensor, order)
    if module is not None and tensor > 1:
        check_plan(module, styles, tensor)
    return topology


def check_reuse(
    name: str,
    have: Topology,
    world_size: int,
    tensor: Size,
    expert: Size,
    expert_tensor: int | None,
    order: RankOrder,
) -> None:
    """See that the arguments agree with the topology ``have``, for which module ``name`` has been cut before.

    Raises:
        LayoutError: If they do not.

    """
    shard_size = have.tensor if expert_tensor is None else expert_tensor
    wanted = ((tensor, have.tensor), (expert, have.expert), (shard_size, have.expert_tensor))
    fits = all(want in ("auto", size) for want, size in wanted)
    if not fits or (have.world_size, have.order) != (world_size, order):
        raise LayoutError(
            f"{name} has been cut for {have} and cannot be cut again for other sizes. Build a new module, and load a "
            "checkpoint into it to keep the weights."
        )


def _topology(
    module: nn.Module | None, world_size: int, tensor: int, expert: Size, expert_tensor: int | None, order: RankOrder
) -> Topology:
    """The topology of a tensor-parallel degree, checked against the MoE layers."""
    layers = {} if module is None else expert_parallel_layers(module)
    shard_size = tensor if expert_tensor is None else expert_tensor
    base = Topology(world_size, tensor, 1, shard_size, order)
    if expert == "auto":
        # The gcd of nothing would be 0.
        expert = math.gcd(base.expert_data, *(layer.num_experts for layer in layers.values())) if layers else 1
    topology = Topology(world_size, tensor, expert, shard_size, order)
    for name, layer in layers.items():
        if layer.axes is None:
            layer.check(name, topology)
    return topology


def _largest_tensor(module: nn.Module | None, styles: Mapping[str, Style], limit: int) -> int:
    """The largest degree that divides ``limit`` and every number of heads, width and vocabulary that the plan cuts.

    It is 1 where a plan names no heads.
    """
    heads = {} if module is None else head_counts(module, styles)
    if module is None or not heads:
        return 1
    widths = [block for _, blocks in planned_cuts(module, styles).values() for block in blocks]
    return math.gcd(limit, *heads.values(), *widths)
