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

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from lightning_ted.errors import UnsupportedError
from lightning_ted.tensor_parallel.embedding import VocabParallelEmbedding
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


def adapted_models(root: nn.Module) -> dict[str, Any]:
    """Models that peft has put adapters into, by qualified name: the outermost ones."""
    peft = sys.modules.get("peft")
    found: dict[str, Any] = {}
    for name, module in root.named_modules() if peft is not None else ():
        if isinstance(module, peft.PeftModel) and not any(name.startswith(f"{outer}.") for outer in found):  # type: ignore[union-attr]
            found[name] = module
    return found


def is_of_adapters(name: str, parameter: nn.Parameter | None) -> bool:
    """Whether a parameter is one that peft saves with the adapters of a model."""
    trained = parameter is not None and parameter.requires_grad
    return trained or ".lora_" in name or ".modules_to_save." in name


def plain_name(name: str) -> str:
    """The name that a layer, or a part of it, has where there are no adapters."""
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "original_module"))


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Take what peft has put around the layers of a model off, for a while."""
    wrapped = [
        (parent, leaf, child)
        for parent in model.modules()
        for leaf, child in parent._modules.items()
        if _inner(child) is not None and _inner(parent) is None
    ]
    try:
        for parent, leaf, child in wrapped:
            base: Any = child
            while (inner := _inner(base)) is not None:
                base = inner
            parent._modules[leaf] = base
        yield
    finally:
        for parent, leaf, child in wrapped:
            parent._modules[leaf] = child


def _inner(module: nn.Module | None) -> nn.Module | None:
    """What a wrapper of peft's is around; None if it is something else."""
    if module is None or lora_layers() is None:
        return None
    return module._modules.get("original_module" if _is_copied(module) else "base_layer")


def initialisers_of_adapters(root: nn.Module) -> dict[int, Callable[[], object]]:
    """What gives adapters without storage, by the ``id`` of the module, the first values that peft would."""
    found: dict[int, Callable[[], object]] = {}
    lora = lora_layers()
    for holder in root.modules() if lora is not None else ():
        configs: Any = holder.__dict__.get("peft_config")
        layers: list[Any] = list(holder.modules()) if isinstance(configs, Mapping) else []
        for layer in layers:
            if isinstance(layer, lora.LoraLayer):
                for factors in (layer.lora_A, layer.lora_B):
                    for adapter, module in factors.items():
                        kind = getattr(configs.get(adapter), "init_lora_weights", True)
                        is_first, r = factors is layer.lora_A, layer.r[adapter]
                        found[id(module)] = partial(_initialise, module, is_first, r, kind)
                found[id(layer.lora_embedding_A)] = partial(_fill, layer.lora_embedding_A, nn.init.zeros_)
                found[id(layer.lora_embedding_B)] = partial(_fill, layer.lora_embedding_B, nn.init.normal_)
            elif _is_copied(layer):
                for module in layer.modules_to_save.modules():
                    found[id(module)] = partial(_refuse_copy, module)
    return found


def _initialise(factor: Any, is_first: bool, r: int, kind: Any) -> None:
    """As ``LoraLayer.reset_lora_parameters`` does."""
    if kind is False:
        factor.reset_parameters()
    elif kind not in (True, "gaussian"):
        raise UnsupportedError(
            f"`init_lora_weights={kind!r}` looks at the weights of the model, which has been built without storage and has none "
            "yet; use True or 'gaussian', or call peft on a model that has its weights."
        )
    elif not is_first:
        _fill(factor, nn.init.zeros_)
    elif kind is True:
        nn.init.kaiming_uniform_(factor.weight, a=math.sqrt(5))
    else:
        nn.init.normal_(factor.weight, std=1 / r)


def _fill(module: nn.Module, how: Callable[[Any], object]) -> None:
    for parameter in module.parameters():
        how(parameter)


def _refuse_copy(module: nn.Module) -> None:
    raise UnsupportedError(
        f"`modules_to_save` has copied a {type(module).__name__} of a model that has been built without storage, before its "
        "weights were there. Call peft on a model that has its weights, or leave `modules_to_save` out."
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
    if style.name not in _BASE_ONLY | _FACTOR.keys():
        return {name: style}
    _refuse_late(name, layer)
    result = {base: style}
    factor = _FACTOR.get(style.name)
    for adapter in getattr(layer, factor) if factor is not None else ():
        result[f"{name}.{factor}.{adapter}"] = replace(style, beside=Beside(base, f"{name}.lora_dropout.{adapter}"))
    return result


def _refuse_late(name: str, layer: Any) -> None:
    # Of a layer that was whole then, peft knows the whole sizes.
    base = layer.base_layer
    if (
        (isinstance(base, ColumnParallelLinear) and layer.out_features == base.out_features)
        or (isinstance(base, RowParallelLinear) and layer.in_features == base.in_features)
        or (isinstance(base, VocabParallelEmbedding) and layer.in_features == base.num_embeddings)
    ):
        raise UnsupportedError(
            f"'{name}' got adapters after it had been cut, so their factors have the shapes of one rank's part. Call peft in "
            "`__init__` or `configure_model`."
        )
