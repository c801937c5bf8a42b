"""torch's own attention, whose heads are shared out (arXiv 1909.08053, section 3).

Shapes: N samples, L tokens of the queries, S of the keys, E width, H heads of all ranks, h = H / t of this one, d = E / H.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ted.collectives.tensor import copy_to_shards, gather_features, sum_shards, to_autocast
from lightning_ted.errors import UnsupportedError
from lightning_ted.mesh import Axis
from lightning_ted.tensor_parallel.linear import RowParallelLinear, ShardedRegion

#: Weights that make queries, keys and values of the inputs: one of all three, or one of each.
IN_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class HeadParallelAttention(nn.MultiheadAttention):
    """Each rank holds some heads, and the columns of the output projection that belong to them.

    From outside it is the module that it was: inputs, masks and outputs are of all heads, and so are ``embed_dim`` and
    ``num_heads``. It has no fused inference kernel, which would not communicate.
    """

    region: ShardedRegion
    reads_memory: bool

    @classmethod
    def adopt(cls, attention: nn.MultiheadAttention, region: ShardedRegion, reads_memory: bool) -> None:
        """Make ``attention`` head-parallel; its parameters are cut by the caller.

        Args:
            attention: The module, whose number of heads the axis divides.
            region: What its input and output projections share.
            reads_memory: In a sequence-parallel stack: keys and values come from outside of the stack, whole.

        """
        attention.__class__ = cls
        attention.region, attention.reads_memory = region, reads_memory  # type: ignore[assignment]
        RowParallelLinear.adopt(cast(nn.Linear, attention.out_proj), region, split_input=False)

    @staticmethod
    def cuts(attention: nn.MultiheadAttention) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Parameter to the dimension that is cut and the lengths of its blocks."""
        width = attention.embed_dim
        cuts: dict[str, tuple[int, tuple[int, ...]]] = {
            "in_proj_weight": (0, (width,) * 3),
            "in_proj_bias": (0, (width,) * 3),
            **dict.fromkeys(IN_PROJECTIONS[1:], (0, (width,))),
            **dict.fromkeys(("bias_k", "bias_v"), (2, (width,))),
        }
        held = {leaf: cut for leaf, cut in cuts.items() if getattr(attention, leaf) is not None}
        return held | {"out_proj.weight": (1, (width,))}

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention: the output ``[N, L, E]`` and, where asked for, weights ``[N, L, S]`` or ``[N, H, L, S]``.

        Returned weights cost a collective: an all-reduce, or a gather of those of each head.

        Raises:
            UnsupportedError: For nested tensors, and for what a sequence-parallel stack cannot take.
            ValueError: If a mask has another shape or dtype than nn.MultiheadAttention takes.

        """
        self._check_inputs(query, key, value, key_padding_mask, attn_mask)
        if is_causal and attn_mask is None:
            raise ValueError(
                "`is_causal=True` is a hint about `attn_mask`, which is None; pass the causal mask as well."
            )
        batched = query.dim() == 3
        try:
            q, k, v = (self._heads(x, batched) for x in self._project(query, key, value))
            # A hint that holds for what is left of the masks, as in torch.
            causal = is_causal and key_padding_mask is None and not need_weights
            mask = None if causal else self._mask(attn_mask, key_padding_mask, q, k, query.dtype, batched)
            k, v, mask = self._with_extra_keys(k, v, mask)
            output, weights = self._attend(q, k, v, mask, causal, need_weights)
            output = self.out_proj(self._joined(output, batched))
        finally:
            self.region.leave()
        return output, None if weights is None else self._whole_weights(weights, average_attn_weights, batched)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """This rank's heads ``[N, h, L, d]``, and their weights ``[N, h, L, S]`` where asked for."""
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal), None
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        weights = (scores if mask is None else scores + mask.to(scores.dtype)).softmax(-1)
        weights = F.dropout(weights, dropout) if dropout else weights
        return weights.to(v.dtype) @ v, weights

    def _check_inputs(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, attn_mask: Tensor | None
    ) -> None:
        if query.is_nested or key.is_nested or value.is_nested:
            raise UnsupportedError(
                "nn.MultiheadAttention takes no nested tensors where tensor parallelism shares out its heads; pass padded "
                "ones and `key_padding_mask`."
            )
        if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
            raise ValueError(
                f"`query`, `key` and `value` must all have 3 dimensions, or 2 without a batch, not {query.dim()}, {key.dim()} and "
                f"{value.dim()}."
            )
        for argument, mask in (("key_padding_mask", padding), ("attn_mask", attn_mask)):
            if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
                raise ValueError(f"`{argument}` must be of bool or of a floating-point dtype, not {mask.dtype}.")
        if self.region.sequence is None:
            return
        if not self.reads_memory and not (query is key and key is value):
            raise UnsupportedError(
                f"`sequence_parallel=True` takes an nn.MultiheadAttention in '{self.region.sequence.name}' only with one tensor as "
                "`query`, `key` and `value`: of others it cannot tell whether their tokens are split; set it to False."
            )
        if any(mask is not None and mask.requires_grad for mask in (padding, attn_mask)):
            raise UnsupportedError(
                f"`sequence_parallel=True`: a mask in '{self.region.sequence.name}' requires a gradient, of which it cannot be "
                "told whether it is to be summed over the heads of all ranks; set it to False."
            )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """This rank's heads of queries, keys and values: ``[..., E] -> [..., E / t]``."""
        # One hand-over of what is one tensor: its gradients are added before they are summed over ranks.
        handed: dict[int, Tensor] = {}
        for x in (query, key, value):
            if id(x) not in handed:
                handed[id(x)] = self._hand_over(x, x is query)
        inputs = [handed[id(x)] for x in (query, key, value)]
        bias = self.in_proj_bias
        if self.in_proj_weight is not None:
            if query is key and key is value:
                return list(F.linear(inputs[0], self.in_proj_weight, bias).chunk(3, -1))
            projections = list(self.in_proj_weight.chunk(3))
        else:
            projections = [getattr(self, leaf) for leaf in IN_PROJECTIONS[1:]]
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return [F.linear(*operands) for operands in zip(inputs, projections, biases, strict=True)]

    def _hand_over(self, x: Tensor, is_query: bool) -> Tensor:
        if self.region.sequence is None or is_query:
            return self.region.enter(x, self.training)
        return copy_to_shards(to_autocast(x), self.region.axis)

    def _heads(self, x: Tensor, batched: bool) -> Tensor:
        """``[L, N, E / t]``, or as the inputs lie, to ``[N, h, L, d]``."""
        heads = x.unflatten(-1, (-1, self.head_dim))
        if not batched:
            return heads.transpose(0, 1).unsqueeze(0)
        return heads.transpose(1, 2) if self.batch_first else heads.permute(1, 2, 0, 3)

    def _joined(self, x: Tensor, batched: bool) -> Tensor:
        """``[N, h, L, d]`` to ``[L, N, E / t]``, or as the inputs lie."""
        if not batched:
            return x.squeeze(0).transpose(0, 1).flatten(-2)
        return (x.transpose(1, 2) if self.batch_first else x.permute(2, 0, 1, 3)).flatten(-2)

    def _mask(
        self,
        attn_mask: Tensor | None,
        padding: Tensor | None,
        q: Tensor,
        k: Tensor,
        dtype: torch.dtype,
        batched: bool,
    ) -> Tensor | None:
        """What is added to the scores of this rank's heads, ``[1 or N, 1 or h, 1 or L, S]``."""
        axis = self.region.axis
        samples, targets, sources = q.shape[0], q.shape[-2], k.shape[-2]
        mask: Tensor | None = None
        if attn_mask is not None:
            per_head = attn_mask.dim() == 3
            expected = (samples * self.num_heads, targets, sources) if per_head else (targets, sources)
            _check_shape("attn_mask", attn_mask, expected)
            mask = _added(attn_mask, dtype, axis)
            if per_head:
                mask = mask.unflatten(0, (samples, self.num_heads)).chunk(axis.size, 1)[axis.rank]
            else:
                mask = mask[None, None]
        if padding is not None:
            _check_shape("key_padding_mask", padding, (samples, sources) if batched else (sources,))
            padded = _added(padding, dtype, axis).view(samples, 1, 1, sources)
            mask = padded if mask is None else mask + padded
        return mask

    def _with_extra_keys(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append the keys and values of ``add_bias_kv`` and ``add_zero_attn``, which no mask hides."""
        samples, heads, _, width = k.shape
        extra: list[tuple[Tensor, Tensor]] = []
        if self.bias_k is not None and self.bias_v is not None:
            # [1, 1, E / t] each
            shape = (1, heads, 1, width)
            extra.append((self.bias_k.view(shape), self.bias_v.view(shape)))
        if self.add_zero_attn:
            extra.append((k.new_zeros(1, 1, 1, 1), v.new_zeros(1, 1, 1, 1)))
        for key, value in extra:
            k = torch.cat([k, key.to(k.dtype).expand(samples, heads, 1, width)], -2)
            v = torch.cat([v, value.to(v.dtype).expand(samples, heads, 1, width)], -2)
        return k, v, mask if mask is None or not extra else F.pad(mask, (0, len(extra)))

    def _whole_weights(self, weights: Tensor, average: bool, batched: bool) -> Tensor:
        """``[N, h, L, S]`` to the mean of all ranks' heads, ``[N, L, S]``, or to all of them, ``[N, H, L, S]``."""
        axis = self.region.axis
        if average:
            whole = sum_shards(weights.sum(1) / self.num_heads, axis)
        else:
            whole = gather_features(weights.movedim(1, -1).contiguous(), axis).movedim(-1, 1)
        return whole if batched else whole.squeeze(0)


def _added(mask: Tensor, dtype: torch.dtype, axis: Axis) -> Tensor:
    """A mask as what is added to scores; its gradient, if any, is that of the heads of all ranks."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
    return copy_to_shards(mask, axis) if mask.requires_grad else mask


def _check_shape(argument: str, mask: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(mask.shape) != expected:
        raise ValueError(f"`{argument}` has the shape {tuple(mask.shape)}, where {expected} is wanted.")
