"""Dense layers that peft has given adapters (LoRA, arXiv 2106.09685): what the plan of a model means for them.

A layer ``X`` with adapters is ``X.base_layer`` beside products of two factors, ``X.lora_B(X.lora_A(dropout(x)))`` times a scale.

Note [Cutting low-rank factors]
Beside a column-parallel base, ``lora_B [out, r]`` is cut as the base is and ``lora_A [r, in]`` is whole: what ``lora_A`` makes is
the same on every tensor rank, so it is handed over to the shards of ``lora_B``, whose backward sums its gradient over them (r
features wide), and ``lora_A`` gets its whole gradient on each rank. Beside a row-parallel base, ``lora_A`` is cut over its input
as the base is, its partial products (again r wide) are summed, and ``lora_B`` is whole. With sequence parallelism, the same
collectives gather and scatter tokens, and the factor that is whole sees split tokens, as all whole weights there. Where a base
makes whole features of whole features (``colwise_gather_output``, ``rowwise_split_input``), both factors stay whole, and nothing
is sent.

Note [Dropout of adapters]
Dropout of a whole input draws the numbers that all tensor ranks draw, though the layer before it has begun this rank's own stream;
dropout of split features draws this rank's own, though the layer before it has ended that stream.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_ted.errors import UnsupportedError
from lightning_ted.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from lightning_ted.tensor_parallel.plan import Beside, Style

#: Styles of a layer that go to its base alone.
_BASE_ONLY = {"colwise_gather_output", "rowwise_split_input", "embedding_rowwise"}
#: Of which factor a style is, too.
_FACTOR = {"colwise": "lora_B", "packed_colwise": "lora_B", "mla_kv_a_proj": "lora_B", "rowwise": "lora_A"}


def lora_layers() -> Any:
    """peft's module of that name; None if it has not been imported, and so nothing has adapters."""
    return sys.modules.get("peft.tuners.lora.layer")


def adapted_styles(root: nn.Module, styles: Mapping[str, Style]) -> dict[str, Style]:
    """A plan for what adapters have been put around: names of layers become those of their bases and factors.

    Args:
        root: The module whose qualified names ``styles`` uses.
        styles: Qualified name to style.

    Raises:
        UnsupportedError: If the adapters have been made after the plan was applied.

    """
    if lora_layers() is None:
        return dict(styles)
    result: dict[str, Style] = {}
    for name, style in styles.items():
        outer = name.removesuffix(".base_layer")  # who names the base means the layer
        module = _module(root, outer)
        if outer != name and not _has_factors(module):
            outer, module = name, _module(root, name)
        if _has_factors(module) and not _variants(module):
            result |= _of_layer(outer, module, style)
        elif _is_copied(module) and style.name in _BASE_ONLY | _FACTOR.keys():
            # Trained in whole: a copy, beside the original, which is used where adapters are disabled.
            result[f"{outer}.original_module"] = style
            result |= {f"{outer}.modules_to_save.{adapter}": style for adapter in module.modules_to_save}
        else:
            result[outer] = style
    return result


def check_adapters(root: nn.Module, styles: Mapping[str, Style]) -> None:
    """Refuse adapters that cannot be cut with the layer that they belong to.

    Args:
        root: The module whose qualified names ``styles`` uses.
        styles: Qualified name to style, as :func:`adapted_styles` returns them.

    Raises:
        UnsupportedError: Naming the layer.

    """
    lora = lora_layers()
    for name, style in styles.items() if lora is not None else ():
        module = _module(root, name)
        if style.name in _BASE_ONLY | _FACTOR.keys() and isinstance(module, lora.LoraLayer):
            kinds = _variants(module) or {type(module).__name__}
            raise UnsupportedError(
                f"'{name}' has adapters of the kind {', '.join(sorted(kinds))}, which need whole weights, and the plan cuts it "
                f"(style '{style.name}'). Use plain LoRA (`use_dora=False` and the like; `target_modules` for layers), leave "
                "the layer out of the plan, or set `tensor_parallel_size=1`."
            )


def _module(root: nn.Module, name: str) -> Any:
    """The module of a name; None for a parameter."""
    try:
        return root.get_submodule(name)
    except AttributeError:
        return None


def _has_factors(module: Any) -> bool:
    return type(module) in (lora_layers().Linear, lora_layers().Embedding)


def _is_copied(module: Any) -> bool:
    return type(module).__name__ == "ModulesToSaveWrapper" and type(module).__module__.startswith("peft.")


def _variants(layer: Any) -> set[str]:
    """What the adapters of a layer are beside plain products."""
    kinds = {type(variant).__name__ for variant in layer.lora_variant.values()}
    return kinds | ({"DoRA"} if len(layer.lora_magnitude_vector) and not kinds else set())


def _of_layer(name: str, layer: Any, style: Style) -> dict[str, Style]:
    base = f"{name}.base_layer"
    if style.name in _BASE_ONLY:
        return {base: style}
    if style.name not in _FACTOR:
        return {name: style}
    result = {base: style}
    factor = _FACTOR[style.name]
    for adapter, module in getattr(layer, factor).items():
        _refuse_late(name, layer.base_layer, module)
        result[f"{name}.{factor}.{adapter}"] = replace(style, beside=Beside(base, f"{name}.lora_dropout.{adapter}"))
    return result


def _refuse_late(name: str, base: nn.Module, factor: nn.Module) -> None:
    is_cut = [isinstance(module, (ColumnParallelLinear, RowParallelLinear)) for module in (base, factor)]
    if is_cut == [True, False]:
        raise UnsupportedError(
            f"'{name}' got adapters after it had been cut, so their factors have the shapes of one rank's part. Call peft in "
            "`__init__` or `configure_model`."
        )
