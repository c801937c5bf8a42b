"""The networks of a user's experts: a list of modules, or weights of all experts in one parameter.

Note [Stacked experts]
The experts of a list become one module, with a parameter ``[E, ...]`` for each parameter that every expert has: ``3.w1.weight``
becomes a part of ``w1.weight``. So they can be cut over the expert axis, and multiplied together.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import permutations, product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from lightning_ted.adapters.foreign import ForeignExperts
from lightning_ted.checkpoint.stacked import with_stacked
from lightning_ted.errors import LayoutError, SpecError
from lightning_ted.layout import Cut
from lightning_ted.mesh import SINGLE
from lightning_ted.moe.activations import Activation
from lightning_ted.moe.expert_parallel import ATTRIBUTE
from lightning_ted.moe.experts import Groups
from lightning_ted.moe.routing import read_sizes
from lightning_ted.topology import Topology

#: What is tried where nothing is said.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}
_AS_IT_IS = Activation(lambda hidden: hidden, lambda grad, hidden: grad)
#: How far an expert's own output may be from what it is taken for, relative to its norm.
_NEAR = 1e-4


@dataclass(frozen=True)
class Network:
    """How an expert's output comes of its weights: ``down(activation(gate) * up)``, or ``down(activation(up))``.

    Attributes:
        weights: Name of the weight ``[E, out, in]`` of each role: ``gate``, ``up``, ``gate_up``, ``down``.
        biases: Name of the bias ``[E, out]`` of each role that has one.
        activation: A key of :data:`ACTIVATIONS`, or a name in ``torch.nn.functional``.
        transposed: Whether the weights lie as ``[E, in, out]``.
        gate_last: Whether the second half of ``gate_up`` is the gate.

    """

    weights: Mapping[str, str]
    biases: Mapping[str, str] = field(default_factory=dict)
    activation: str = "silu"
    transposed: bool = False
    gate_last: bool = False

    def activate(self, x: Tensor) -> Tensor:
        """The activation."""
        known = ACTIVATIONS.get(self.activation)
        return known(x) if known is not None else getattr(F, self.activation)(x)

    def hidden(self, first: Mapping[str, Tensor]) -> Tensor:
        """The hidden features, of what the first layers make, by role."""
        if "gate_up" in first:
            halves = first["gate_up"].chunk(2, -1)
            gate, up = reversed(halves) if self.gate_last else halves
            return self.activate(gate) * up
        return self.activate(first["gate"]) * first["up"] if "gate" in first else self.activate(first["up"])


class NetworkExperts(ForeignExperts):
    """Experts whose network is known, by grouped products.

    Args:
        holder: The module that holds the weights, not cut yet.
        network: What they are.

    """

    def __init__(self, holder: nn.Module, network: Network) -> None:
        self.network = network
        down = _tensor(holder, network.weights["down"])
        super().__init__(down.shape[0])
        d_model, d_ff = down.shape[1:] if not network.transposed else reversed(down.shape[1:])
        self._d_model, self._d_ff = int(d_model), int(d_ff)

    @override
    def widths(self) -> tuple[int, ...]:
        return (self._d_ff, self._d_model) if "down" in self.network.biases else (self._d_ff,)

    @override
    def expert_cuts(self, topology: Topology) -> dict[str, tuple[Cut, ...]]:
        cuts: dict[str, tuple[Cut, ...]] = {}
        over, degree = Cut(0, "expert", topology.expert, (self.num_experts,)), topology.expert_tensor
        for role, name in self.network.weights.items():
            blocks = (self._d_ff,) * (2 if role == "gate_up" else 1)
            is_second = (role == "down") != self.network.transposed
            cuts[name] = (over, Cut(2 if is_second else 1, "expert_tensor", degree, blocks))
        for role, name in self.network.biases.items():
            blocks = (self._d_model,) if role == "down" else (self._d_ff,) * (2 if role == "gate_up" else 1)
            # That of the output is cut over its features, not kept whole: added once however many shards there are.
            cuts[name] = (over, Cut(1, "expert_tensor", degree, blocks))
        return cuts

    @override
    def compute(
        self, holder: nn.Module, rows_ND: Tensor, counts_e: Tensor, sizes_e: list[int] | None, is_read: bool
    ) -> Tensor:
        network, groups = self.network, Groups(counts_e, rows_ND.shape[0], sizes_e)

        def weight(role: str) -> Tensor:
            found = _tensor(holder, network.weights[role])
            return found.transpose(1, 2) if network.transposed else found

        def bias(role: str) -> Tensor | None:
            return _tensor(holder, network.biases[role]) if role in network.biases else None

        first = {
            role: groups.bias(groups.linear(rows_ND, weight(role)), bias(role))
            for role in network.weights
            if role != "down"
        }
        out_ND = groups.activated_linear(network.hidden(first), _AS_IT_IS, weight("down"), is_read)
        return groups.bias(out_ND, bias("down"), SINGLE if self.axes is None else self.axes.expert_tensor)


class ListedExperts(ForeignExperts):
    """Experts of any kind that were a list: each of this rank's runs by itself.

    Args:
        holder: The module that they have become.
        expert: One of them, which lends its forward.

    """

    def __init__(self, holder: StackedExperts, expert: nn.Module) -> None:
        super().__init__(holder.num_experts)
        self._names = list(holder.paths)
        self._kind = type(expert).__name__
        self._expert = copy.deepcopy(expert).to("meta")

    @override
    def widths(self) -> tuple[int, ...]:
        return (1,)

    @override
    def check(self, name: str, topology: Topology) -> None:
        if topology.expert_tensor > 1:
            raise LayoutError(
                f"`expert_tensor_parallel_size={topology.expert_tensor}` cannot cut the experts of '{name}': {self._kind} is no "
                "network of two or three linear layers and an activation. Set it to 1."
            )
        super().check(name, topology)

    @override
    def expert_cuts(self, topology: Topology) -> dict[str, tuple[Cut, ...]]:
        return {name: (Cut(0, "expert", topology.expert, (self.num_experts,)),) for name in self._names}

    @override
    def compute(
        self, holder: nn.Module, rows_ND: Tensor, counts_e: Tensor, sizes_e: list[int] | None, is_read: bool
    ) -> Tensor:
        self._expert.train(holder.training)
        weights = {name: _tensor(holder, name) for name in self._names}
        sizes = read_sizes(counts_e) if sizes_e is None else sizes_e
        parts = [
            functional_call(self._expert, {name: weight[number] for name, weight in weights.items()}, (rows_MD,))
            for number, rows_MD in enumerate(rows_ND.split(sizes))
        ]
        return torch.cat(parts)


class StackedExperts(nn.Module):
    """What a list of experts becomes; see Note [Stacked experts].

    Args:
        experts: The list; its parameters are taken over.

    Attributes:
        num_experts: Number of experts.
        paths: Names of the parameters that each of them had.

    Raises:
        SpecError: If they do not have the same parameters, or have buffers.

    """

    def __init__(self, experts: nn.ModuleList) -> None:
        super().__init__()
        self.num_experts = len(experts)
        named = [dict(expert.named_parameters(remove_duplicate=False)) for expert in experts]
        shapes = [{name: (p.shape, p.dtype, p.requires_grad) for name, p in found.items()} for found in named]
        for number, other in enumerate(shapes):
            if other != shapes[0]:
                name = next(n for n in {**shapes[0], **other} if shapes[0].get(n) != other.get(n))
                raise SpecError(
                    f"Expert {number} differs from expert 0 in '{name}'; experts that are shared out have the same parameters."
                )
        if next(experts.buffers(), None) is not None:
            raise SpecError("The experts have buffers, which cannot be shared out; use `register_moe_adapter`.")
        self.paths = list(shapes[0])
        for path in self.paths:
            parts = [found[path] for found in named]
            with torch.no_grad():
                stacked = nn.Parameter(torch.stack([part.detach() for part in parts]), parts[0].requires_grad)
            parent: nn.Module = self
            *above, leaf = path.split(".")
            for part in above:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.register_parameter(leaf, stacked)

    def told(self) -> dict[str, Any]:
        """What a checkpoint has to tell of it; see :mod:`lightning_ted.checkpoint.stacked`."""
        return {"experts": self.num_experts, "parameters": self.paths}

    @override
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        whole = with_stacked({prefix.removesuffix("."): self.told()}, state_dict)
        for key in state_dict.keys() - whole.keys():
            del state_dict[key]  # in place: what is left over is reported
        state_dict.update(whole)
        super()._load_from_state_dict(state_dict, prefix, *args)


def stacked_in(root: nn.Module) -> dict[str, dict[str, Any]]:
    """What a checkpoint has to tell of the stacked experts in a module, by their names."""
    return {name: module.told() for name, module in root.named_modules() if isinstance(module, StackedExperts)}


# -- finding out what they are -----------------------------------------------------------------------------------------------


def networks_of_list(expert: nn.Module, activation: str | None) -> Iterator[Network]:
    """What an expert may be, if it is made of two or three linear layers: candidates, of which its output tells the right one."""
    linears = {name: child for name, child in expert.named_modules() if type(child) is nn.Linear}
    own = {name for name, _ in expert.named_parameters()}
    if own != {f"{name}.{leaf}" for name, child in linears.items() for leaf, _ in child.named_parameters()}:
        return
    shapes = {name: (child.out_features, child.in_features) for name, child in linears.items()}
    for roles in _assignments(shapes):
        weights = {role: f"{name}.weight" for role, name in roles.items()}
        biases = {role: f"{name}.bias" for role, name in roles.items() if linears[name].bias is not None}
        yield from _variants(weights, biases, False, activation)


def networks_of_weights(
    holder: nn.Module, d_model: int, names: Mapping[str, str] | None, activation: str | None
) -> Iterator[Network]:
    """What fused weights may be: candidates."""
    found = {name: p for name, p in holder.named_parameters(recurse=False) if p.dim() == 3}
    flat = {name: p for name, p in holder.named_parameters(recurse=False) if p.dim() == 2}
    for transposed in (False, True):
        shapes = {n: (p.shape[2], p.shape[1]) if transposed else (p.shape[1], p.shape[2]) for n, p in found.items()}
        for roles in [names] if names is not None else _assignments(shapes):
            if any(name not in shapes for name in roles.values()) or not _fits(roles, shapes, d_model):
                continue
            widths = {role: shapes[name][0] for role, name in roles.items()}
            for biases in _biases(widths, flat):
                yield from _variants(roles, biases, transposed, activation)


def _assignments(shapes: Mapping[str, tuple[int, int]]) -> Iterator[dict[str, str]]:
    """Which layer, of these ``(out, in)`` features, may have which role."""
    for roles in (("gate", "up", "down"), ("up", "down"), ("gate_up", "down")):
        for names in permutations(shapes) if len(shapes) == len(roles) else ():
            found = dict(zip(roles, names, strict=True))
            if _fits(found, shapes, shapes[found["down"]][0]):
                yield found


def _fits(roles: Mapping[str, str], shapes: Mapping[str, tuple[int, int]], d_model: int) -> bool:
    d_out, d_ff = shapes[roles["down"]]
    wanted = {"gate": (d_ff, d_model), "up": (d_ff, d_model), "gate_up": (2 * d_ff, d_model), "down": (d_model, d_ff)}
    return d_out == d_model and all(shapes[name] == wanted[role] for role, name in roles.items())


def _biases(widths: Mapping[str, int], flat: Mapping[str, nn.Parameter]) -> Iterator[dict[str, str]]:
    """Which parameter ``[E, out]`` may be the bias of which role: all of them have to be one."""
    for roles in permutations(widths, len(flat)) if len(flat) <= len(widths) else ():
        found = dict(zip(roles, flat, strict=True))
        if all(flat[name].shape[1] == widths[role] for role, name in found.items()):
            yield found


def _variants(
    weights: Mapping[str, str], biases: Mapping[str, str], transposed: bool, activation: str | None
) -> Iterator[Network]:
    orders = (False, True) if "gate_up" in weights else (False,)
    for name, last in product([activation] if activation is not None else ACTIVATIONS, orders):
        yield Network(weights, biases, name, transposed, last)


def is_network(expert: nn.Module, network: Network, tokens_TD: Tensor) -> bool:
    """Whether an expert is this network, by what it makes of tokens."""

    def linear(x: Tensor, role: str) -> Tensor:
        bias = _tensor(expert, network.biases[role]) if role in network.biases else None
        return F.linear(x, _tensor(expert, network.weights[role]), bias)

    first = {role: linear(tokens_TD, role) for role in network.weights if role != "down"}
    return near(linear(network.hidden(first), "down"), expert(tokens_TD))


def near(got: Tensor, want: Tensor) -> bool:
    """Whether two outputs are the same but for rounding."""
    if got.shape != want.shape:
        return False
    tolerance = _NEAR if want.dtype in (torch.float32, torch.float64) else 5e-2
    return bool((got.float() - want.float()).norm() <= tolerance * want.float().norm())


def attach(holder: nn.Module, layer: ForeignExperts) -> None:
    """Let a module be known as one that holds a layer's weights."""
    holder.__dict__[ATTRIBUTE] = layer


def _tensor(module: nn.Module, name: str) -> Any:
    parent, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(parent), leaf)
