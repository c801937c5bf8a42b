"""Adapters for MoE blocks that keep neither Hugging Face's contract nor could be described otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from lightning_ted.errors import UnsupportedError
from lightning_ted.moe.expert_parallel import expert_parallel_layers

Adapter = Callable[[Any], "nn.Module | None"]
A = TypeVar("A", bound=Adapter)

#: By the qualified name of a block's class, so that nothing has to be imported to know it.
_ADAPTERS: dict[str, Adapter] = {}
#: Under which attribute a block that has been mended says so.
_ADAPTED = "_ted_adapted"


def register_moe_adapter(block_class: type[nn.Module] | str, adapter: A | None = None) -> Any:
    """Say what is to be done with every MoE block of a class before it is shared out; also as a decorator.

    An adapter gets a block, not cut yet and perhaps without storage, and either returns what takes its place or mends it and
    returns None. Afterwards there has to be an :class:`~lightning_ted.moe.expert_parallel.ExpertParallelLayer` in it: a
    :class:`~lightning_ted.moe.MoE` with the block's parameters, or one as the attribute ``expert_parallel`` of a module whose
    parameters it cuts.

    Args:
        block_class: The class, or its qualified name; subclasses are other classes.
        adapter: What is called with each block.

    Returns:
        The adapter.

    Raises:
        UnsupportedError: If it is no class of modules, nor a name.

    """
    if adapter is None:
        return lambda given: register_moe_adapter(block_class, given)
    if isinstance(block_class, str):
        name = block_class
    elif isinstance(block_class, type) and issubclass(block_class, nn.Module):
        name = qualified_name(block_class)
    else:
        raise UnsupportedError(f"`block_class={block_class!r}` must be a class of modules, or its qualified name.")
    _ADAPTERS[name] = adapter
    return adapter


def qualified_name(kind: type) -> str:
    """``module.Class``."""
    return f"{kind.__module__}.{kind.__qualname__}"


def is_registered(module: nn.Module) -> bool:
    """Whether there is an adapter for a module's class."""
    return qualified_name(type(module)) in _ADAPTERS


def adopt_registered(root: nn.Module) -> None:
    """Call the adapters of all blocks in a module. What has been adapted already is left alone.

    Raises:
        UnsupportedError: If an adapter leaves nothing that can be shared out, or replaces ``root`` itself.

    """
    for name, block in list(root.named_modules()):
        adapter = _ADAPTERS.get(qualified_name(type(block)))
        if adapter is None or block.__dict__.get(_ADAPTED):
            continue
        block.__dict__[_ADAPTED] = True
        replacement = adapter(block)
        if replacement is not None:
            if not name:
                raise UnsupportedError(
                    f"The adapter of {type(block).__name__} cannot replace the LightningModule itself."
                )
            parent, _, leaf = name.rpartition(".")
            setattr(root.get_submodule(parent), leaf, replacement)
        if not expert_parallel_layers(block if replacement is None else replacement):
            raise UnsupportedError(
                f"The adapter of {type(block).__name__} leaves no `ExpertParallelLayer` in '{name}'; return a `MoE`, or give a "
                "module in it the attribute `expert_parallel`."
            )
