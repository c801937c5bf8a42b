"""The experts of one layer: one fused weight for all of them, multiplied group by group."""

from __future__ import annotations

import math
import warnings
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_ted.collectives.tensor import to_autocast
from lightning_ted.errors import TEDError
from lightning_ted.layout import Cut
from lightning_ted.mesh import SINGLE, Axis
from lightning_ted.moe.activations import ACTIVATIONS, Activation, ActivationName, activate
from lightning_ted.moe.routing import read_sizes
from lightning_ted.topology import Topology


class Experts(nn.Module):
    """Feed-forward networks of equal shape, ``num_experts`` of them.

    ``swiglu``: ``down(silu(gate(x)) * up(x))``, weights ``gate_up_proj [E, 2F, D]`` and ``down_proj [E, D, F]``;
    ``gelu`` and ``relu``: ``down(act(up(x)))``, weights ``up_proj [E, F, D]`` and ``down_proj [E, D, F]``.

    Args:
        num_experts: Number of experts.
        d_model: Width of the tokens.
        d_ff: Hidden width of an expert.
        activation: ``"swiglu"``, ``"gelu"`` or ``"relu"``.
        bias: Add biases to both projections.

    """

    down_proj_bias: nn.Parameter | None

    def __init__(
        self, num_experts: int, d_model: int, d_ff: int, activation: ActivationName = "swiglu", bias: bool = False
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise TEDError(f"`activation={activation!r}` is unknown; choose one of {', '.join(ACTIVATIONS)}.")
        for argument, value in (("num_experts", num_experts), ("d_model", d_model), ("d_ff", d_ff)):
            if not isinstance(value, int) or value < 1:
                raise TEDError(f"`{argument}={value!r}` must be a positive whole number.")
        if not isinstance(bias, bool):
            raise TEDError(f"`bias={bias!r}` must be True or False.")
        self.num_experts = num_experts
        self.d_model = d_model
        self.d_ff = d_ff
        self.activation = activation
        # Where the hidden width is cut; set by a strategy.
        self.tensor_axis: Axis = SINGLE
        hidden = ACTIVATIONS[activation].widening * d_ff
        self.up_name = "gate_up_proj" if activation == "swiglu" else "up_proj"
        self.register_parameter(self.up_name, nn.Parameter(torch.empty(num_experts, hidden, d_model)))
        self.down_proj = nn.Parameter(torch.empty(num_experts, d_model, d_ff))
        up_bias = nn.Parameter(torch.empty(num_experts, hidden)) if bias else None
        self.register_parameter(f"{self.up_name}_bias", up_bias)
        self.register_parameter("down_proj_bias", nn.Parameter(torch.empty(num_experts, d_model)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise every expert as :class:`torch.nn.Linear` does, each differently."""
        for name, fan_in in ((self.up_name, self.d_model), ("down_proj", self.d_ff)):
            for suffix in ("", "_bias"):
                parameter = getattr(self, name + suffix)
                if parameter is not None:
                    nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def forward(
        self, rows_ND: Tensor, counts_e: Tensor, sizes_e: list[int] | None = None, is_read: bool = True
    ) -> Tensor:
        """Run every expert on its rows.

        Args:
            rows_ND: Rows in expert order ``[N, D]``.
            counts_e: Number of rows of each local expert, adding up to ``N``; int64, on the rows' device.
            sizes_e: The same on the host, if known; read when needed otherwise.
            is_read: False where nobody reads the values of what is returned, only its graph: the last product is then left out.

        Returns:
            ``[N, D]``; a partial result, to be summed over the expert-tensor axis, where the hidden width is cut.

        """
        up: Tensor = getattr(self, self.up_name)
        up_bias: Tensor | None = getattr(self, f"{self.up_name}_bias")
        groups = Groups(counts_e, rows_ND.shape[0], sizes_e)
        hidden_NH = groups.bias(groups.linear(rows_ND, up), up_bias)
        out_ND = groups.activated_linear(hidden_NH, ACTIVATIONS[self.activation], self.down_proj, is_read)
        return groups.bias(out_ND, self.down_proj_bias, self.tensor_axis)

    def cuts(self, topology: Topology) -> dict[str, tuple[Cut, ...]]:
        """How the weights are to be cut, by name."""
        over = Cut(0, "expert", topology.expert, (self.num_experts,))
        blocks = (self.d_ff,) * ACTIVATIONS[self.activation].widening
        degree = topology.expert_tensor
        cuts = {
            self.up_name: (over, Cut(1, "expert_tensor", degree, blocks)),
            f"{self.up_name}_bias": (over, Cut(1, "expert_tensor", degree, blocks)),
            "down_proj": (over, Cut(2, "expert_tensor", degree, (self.d_ff,))),
            # Cut over its features, not kept whole: added once however many shards there are.
            "down_proj_bias": (over, Cut(1, "expert_tensor", degree, (self.d_model,))),
        }
        return {name: cut for name, cut in cuts.items() if getattr(self, name) is not None}

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, d_model={self.d_model}, d_ff={self.d_ff}, activation={self.activation}"


class Groups:
    """Consecutive rows grouped by expert."""

    def __init__(self, counts_e: Tensor, rows: int, sizes_e: list[int] | None = None) -> None:
        self._counts_e = counts_e
        self._rows = rows
        self._offsets_e = counts_e.cumsum(0).to(torch.int32)
        self._sizes = sizes_e

    def linear(self, rows_NI: Tensor, weight_eOI: Tensor) -> Tensor:
        """``rows @ weight[expert].T``: one grouped GEMM, or a loop over the experts where that cannot be used."""
        rows_NI, weight_eOI = to_autocast(rows_NI), to_autocast(weight_eOI)
        if not self._can_fuse(rows_NI.dtype, weight_eOI):
            return self._one_by_one(rows_NI, weight_eOI)
        return _grouped_linear(rows_NI.contiguous(), weight_eOI, self._offsets_e)

    def activated_linear(
        self, hidden_NH: Tensor, activation: Activation, weight_eOI: Tensor, is_read: bool = True
    ) -> Tensor:
        """:meth:`linear` of ``activation(hidden)``; of the two, only ``hidden`` is kept for the backward."""
        hidden_NH, weight_eOI = to_autocast(hidden_NH), to_autocast(weight_eOI)
        if not self._can_fuse(hidden_NH.dtype, weight_eOI):
            return self._one_by_one(activate(hidden_NH, activation), weight_eOI, is_read)
        return _ActivatedLinear.apply(hidden_NH, activation, weight_eOI, self._offsets_e, is_read)

    def _can_fuse(self, dtype: torch.dtype, weight_eOI: Tensor) -> bool:
        obstacle = grouped_gemm_obstacle(dtype, weight_eOI)
        if obstacle is not None:
            _warn_slow(obstacle)
        return self._rows > 0 and obstacle is None

    def _one_by_one(self, rows_NI: Tensor, weight_eOI: Tensor, is_read: bool = True) -> Tensor:
        if self._sizes is None:
            self._sizes = read_sizes(self._counts_e) if self._rows else [0] * len(weight_eOI)
        return _LinearOneByOne.apply(rows_NI, weight_eOI, self._sizes, is_read)

    def bias(self, rows_NO: Tensor, bias_eO: Tensor | None, cut: Axis = SINGLE) -> Tensor:
        """Add each row's expert's bias; one that is cut over ``cut`` adds to this rank's features only."""
        if bias_eO is None:
            return rows_NO
        each_NO = _RepeatRows.apply(bias_eO, self._counts_e, self._rows, rows_NO.dtype)
        if cut.size > 1:
            width = bias_eO.shape[1]
            each_NO = F.pad(each_NO, (cut.rank * width, (cut.size - 1 - cut.rank) * width))
        return rows_NO + each_NO


def _grouped_linear(rows_NI: Tensor, weight_eOI: Tensor, offsets_e: Tensor) -> Tensor:
    return F.grouped_mm(rows_NI, weight_eOI.transpose(-2, -1), offs=offsets_e)


class _ActivatedLinear(torch.autograd.Function):
    """The down projection of activated features.

    Left to autograd, the projection would keep its input: as large as the hidden features, or half of them when gated.
    Making it again is one elementwise pass.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, activation: Activation, weight_eOI: Tensor, offsets_e: Tensor, is_read: bool
    ) -> Tensor:
        ctx.save_for_backward(hidden_NH, weight_eOI, offsets_e)
        ctx.activation = activation
        if not is_read:
            return _unread(hidden_NH, weight_eOI)
        return _grouped_linear(activation.value(hidden_NH), weight_eOI, offsets_e)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
        hidden_NH, weight_eOI, offsets_e = ctx.saved_tensors
        grad_NO = grad_NO.contiguous()
        grad_weight = grad_hidden = None
        if ctx.needs_input_grad[2]:
            grad_weight = F.grouped_mm(grad_NO.T, ctx.activation.value(hidden_NH), offs=offsets_e)
        if ctx.needs_input_grad[0]:
            grad_NI = F.grouped_mm(grad_NO, weight_eOI, offs=offsets_e)
            grad_hidden = ctx.activation.gradient(grad_NI, hidden_NH)
        return grad_hidden, None, grad_weight, None, None


class _LinearOneByOne(torch.autograd.Function):
    """Each expert's product by itself, for what the grouped GEMM cannot multiply."""

    @staticmethod
    def forward(ctx: Any, rows_NI: Tensor, weight_eOI: Tensor, sizes: list[int], is_read: bool) -> Tensor:
        needs_rows, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(rows_NI if needs_weight else None, weight_eOI if needs_rows else None)
        ctx.sizes = sizes
        if not is_read:
            return _unread(rows_NI, weight_eOI)
        pieces = zip(rows_NI.split(sizes), weight_eOI, strict=True)
        return torch.cat([F.linear(piece, weight) for piece, weight in pieces])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows_NI, weight_eOI = ctx.saved_tensors
        grad_rows = grad_weight = None
        grads = grad_NO.split(ctx.sizes)
        if ctx.needs_input_grad[0]:
            grad_rows = torch.cat([grad @ weight for grad, weight in zip(grads, weight_eOI, strict=True)])
        if ctx.needs_input_grad[1]:
            pieces = zip(grads, rows_NI.split(ctx.sizes), strict=True)
            grad_weight = torch.stack([grad.T @ piece for grad, piece in pieces])
        return grad_rows, grad_weight, None, None


def _unread(rows_NI: Tensor, weight_eOI: Tensor) -> Tensor:
    """Something of the shape of their product."""
    return rows_NI.new_zeros(()).expand(rows_NI.shape[0], weight_eOI.shape[1])


class _RepeatRows(torch.autograd.Function):
    """Row ``e`` as often as ``counts[e]`` says; gradient: sums of segments, where an index's would be a scatter-add."""

    @staticmethod
    def forward(ctx: Any, each_eO: Tensor, counts_e: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(counts_e)
        ctx.dtype = each_eO.dtype
        return each_eO.to(dtype).repeat_interleave(counts_e, dim=0, output_size=rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor, None, None, None]:
        (counts_e,) = ctx.saved_tensors
        precise = grad_NO.float() if grad_NO.dtype.itemsize == 2 else grad_NO
        # Unsafe only in that the lengths are not checked, on the host, to add up.
        sums = torch.segment_reduce(precise.contiguous(), "sum", lengths=counts_e, unsafe=True, initial=0)
        return sums.to(ctx.dtype), None, None, None


def grouped_gemm_obstacle(dtype: torch.dtype, weight_eOI: Tensor) -> str | None:
    """Why torch's grouped GEMM cannot multiply rows of ``dtype`` with the weight, or None if it can."""
    device = weight_eOI.device
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it has no kernel for {dtype}"
    if device.type == "cuda" and (dtype != torch.bfloat16 or torch.cuda.get_device_capability(device) < (8, 0)):
        return "on CUDA it wants bfloat16 and compute capability 8.0"
    for width in weight_eOI.shape[1:]:
        if width * dtype.itemsize % 16:
            return f"a row of {width} elements of {dtype} is not a multiple of 16 bytes"
    return None


@cache
def _warn_slow(obstacle: str) -> None:
    warnings.warn(
        f"The experts are multiplied one by one, because the grouped GEMM cannot be used: {obstacle}. Results are the same, "
        "slower where experts are many.",
        stacklevel=2,
    )
