"""The plan of torch's own layers, which need none of the user's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ted.tensor_parallel.attention import IN_PROJECTIONS, HeadParallelAttention
from lightning_ted.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from lightning_ted.tensor_parallel.plan import Style, outer_name

_ATTENTION = (nn.MultiheadAttention, HeadParallelAttention)
_LINEAR = (nn.Linear, ColumnParallelLinear, RowParallelLinear)
_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_ELEMENTWISE = (F.relu, F.gelu, F.silu)


def builtin_styles(root: nn.Module, named: Collection[str], closed: Collection[str]) -> dict[str, Style]:
    """Styles of every nn.MultiheadAttention, and of the feed-forward network of torch's encoder and decoder layers.

    Left alone are subclasses with methods of their own, layers that make a weight from other parameters, and feed-forward
    networks whose activation has parameters or mixes features.

    Args:
        root: The module.
        named: Qualified names in plans of others; what they name, or name a part of, keeps their style.
        closed: Qualified names of modules inside of which nothing is cut.

    Returns:
        Qualified name to style.

    """
    styles: dict[str, Style] = {}
    taken = [f"{name}." for name in named]
    for name, module in root.named_modules(remove_duplicate=False):
        for group in _groups(name, module):
            inside = any(f"{member}.".startswith(f"{prefix}.") for member in group for prefix in closed)
            others = any(
                f"{member}.".startswith(other) or other.startswith(f"{member}.") for member in group for other in taken
            )
            if not inside and not others:
                styles |= group
    return styles


def block_fused_inference(root: nn.Module, names: Collection[str]) -> None:
    """Keep the encoder layers around cut layers, and their encoders, off torch's fused kernels.

    These read the weights of a whole layer at once, in evaluation without gradients, and do not communicate. An encoder makes
    nested tensors for them, which nothing else can read.

    Args:
        root: The module.
        names: Qualified names of the layers that are cut.

    """
    for name, module in root.named_modules(remove_duplicate=False):
        if not isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerEncoder)):
            continue
        if any(other.startswith(f"{name}." if name else "") for other in names):
            if isinstance(module, nn.TransformerEncoderLayer):
                # "Another activation", for which there is no kernel. Nothing else reads it.
                module.activation_relu_or_gelu = 0
            else:
                module.use_nested_tensor = False


def _groups(name: str, module: nn.Module) -> Iterator[dict[str, Style]]:
    """What is cut together in a module itself: name to style."""
    prefix = f"{name}." if name else ""
    # One inside a wrapper (peft's) is read by that.
    if name and outer_name(name) == name and type(module) in _ATTENTION and _is_plain(module):
        yield {name: Style("multihead_attention")}
    for kind in _LAYERS:
        if isinstance(module, kind) and _keeps_methods(module, kind):
            plain = all(type(x) in _LINEAR and "weight" in x._parameters for x in (module.linear1, module.linear2))
            if plain and _is_elementwise(module.activation):
                yield {f"{prefix}linear1": Style("colwise"), f"{prefix}linear2": Style("rowwise")}


def _is_plain(attention: nn.Module) -> bool:
    """Whether the weights are the module's own, not made from others."""
    output = attention.out_proj
    return (
        attention._parameters.keys() >= set(IN_PROJECTIONS)
        and isinstance(output, nn.Linear)
        and "weight" in output._parameters
        and type(output).forward in (nn.Linear.forward, RowParallelLinear.forward)
    )


def _keeps_methods(module: nn.Module, kind: type[nn.Module]) -> bool:
    return all(getattr(type(module), method) is getattr(kind, method) for method in ("forward", "_ff_block"))


def _is_elementwise(activation: Callable[[Tensor], Tensor]) -> bool:
    """Whether an activation may see a part of the features, and has no gradients of its own."""
    if activation in _ELEMENTWISE:
        return True
    if isinstance(activation, nn.Module) and next(activation.parameters(), None) is not None:
        return False
    x = torch.linspace(-3.0, 3.0, 8)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return torch.equal(activation(x.clone())[:4], activation(x[:4].clone()))
    except Exception:
        return False  # whatever it asks of its input, it is not only single features
