"""The modules of a model that are recomputed: found or named, and switched in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from functools import partial
from types import MethodType
from typing import Any

from torch import nn

from lightning_ted.errors import UnsupportedError
from lightning_ted.recompute.checkpoint import RecomputeOptions, checkpointed

#: Classes of modules, or their names, alone or with their module's.
BlockNames = str | Collection[str | type[nn.Module]]

_OPTIONS = "_ted_recompute"
_BEFORE = "_ted_recompute_before"
#: What Hugging Face's layers ask while training: whether to be checkpointed, and by which function.
_OWN_SWITCH = ("gradient_checkpointing", "_gradient_checkpointing_func")


#: In a class that :func:`_mix` has made, the class that it was made of.
_BASE = "_ted_recompute_base"

_mixed: dict[type, type] = {}


class _Untold:
    def __init_subclass__(cls, **arguments: Any) -> None:
        pass


def _mix(base: type) -> type:
    """The class of a block, with its call, hooks included, recomputed in backward."""

    def call(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        run = MethodType(base.__call__, self)
        options = self.__dict__.get(_OPTIONS)
        return run(*args, **kwargs) if options is None else checkpointed(options, run, *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        # The class has no name that an unpickler could find.
        reduced = base.__reduce_ex__(self, protocol)  # type: ignore[call-arg]
        assert isinstance(reduced, tuple)
        make, args, *rest = reduced
        if type(self) is not _mixed[base]:
            return reduced  # a parametrization lies above it, and is not to be pickled
        args = tuple(base if arg is type(self) else arg for arg in args)
        return (_remade, (base, base if make is type(self) else make, args), *rest)

    if base not in _mixed:
        names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
        added = {**names, "__call__": call, "__reduce_ex__": reduce, _BASE: base}
        # Without telling the base that it has a child: it may keep a register of them.
        mixed = type(base.__name__, (_Untold, base), added)
        # A child of the base alone: whoever takes off what he has put above or below finds what he expects.
        mixed.__bases__ = (base,)
        _mixed[base] = mixed
    return _mixed[base]


def _remade(base: type, make: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """A copy of a block, before it gets its state."""
    block = make(*args)
    block.__class__ = _mix(base)
    return block


def checkpoint_blocks(
    module: nn.Module, options: RecomputeOptions | None, names: BlockNames | None = None
) -> list[str]:
    """Let the blocks of a model be recomputed in backward, in place; what was switched before is switched back first.

    Args:
        module: The model.
        options: What is recomputed; None for nothing.
        names: The classes of the blocks; None finds the repeated ones. Blocks may lie inside each other.

    Returns:
        The qualified names of the blocks.

    Raises:
        UnsupportedError: If there are none.

    """
    for child in module.modules():
        _switch_back(child)
    if options is None:
        return []
    for child in module.modules():
        if hasattr(child, _OWN_SWITCH[0]):
            child.__dict__[_BEFORE] = {name: child.__dict__[name] for name in _OWN_SWITCH if name in child.__dict__}
    switched = _switch_own(module) if names is None else set()
    blocks = find_blocks(module) if names is None else _named(module, names)
    blocks = {name: block for name, block in blocks.items() if id(block) not in switched}
    for block in blocks.values():
        _switch(block, options)
    for name, child in module.named_modules():
        if _has_switched_on(child):
            child._gradient_checkpointing_func = partial(checkpointed, options)
            blocks.setdefault(name, child)
    _require(blocks, module, options)
    return list(blocks)


def check_blocks(module: nn.Module, options: RecomputeOptions | None, names: BlockNames | None) -> None:
    """Look for the blocks of a complete model and leave them as they are.

    Raises:
        UnsupportedError: As :func:`checkpoint_blocks`.

    """
    if options is None or (names is None and any(True for _ in _own_switches(module))):
        return
    _require(find_blocks(module) if names is None else _named(module, names), module, options)


def _require(blocks: Collection[str], module: nn.Module, options: RecomputeOptions) -> None:
    if not blocks:
        raise UnsupportedError(
            f"`activation_checkpointing={options.mode!r}` finds no nn.ModuleList, nn.ModuleDict or nn.Sequential of several blocks "
            f"of one class in {type(module).__name__}; name the classes of what is to be recomputed in "
            "`activation_checkpointing_policy`, or leave `activation_checkpointing` out."
        )


def _switch(block: nn.Module, options: RecomputeOptions) -> None:
    own = hasattr(block, _OWN_SWITCH[0]) and type(block).__call__ is not nn.Module.__call__
    if own and _uncompiled(block) is block:
        # Hugging Face's layers have a switch of their own, which leaves out caches of keys and values as well.
        block.__dict__.update(gradient_checkpointing=True, _gradient_checkpointing_func=partial(checkpointed, options))
    else:
        block.__dict__[_OPTIONS] = options
        if not hasattr(type(block), _BASE):
            block.__class__ = _mix(type(block))


def _switch_back(block: nn.Module) -> None:
    block.__dict__.pop(_OPTIONS, None)
    if _BASE in type(block).__dict__:
        block.__class__ = type(block).__dict__[_BASE]
    before = block.__dict__.pop(_BEFORE, None)
    # Unless somebody else has switched it since.
    if before is not None and getattr(block.__dict__.get(_OWN_SWITCH[1]), "func", None) is checkpointed:
        for name in _OWN_SWITCH:
            block.__dict__.pop(name, None)
        block.__dict__.update(before)


def _switch_own(module: nn.Module) -> set[int]:
    """Let models that can switch on the checkpointing of their layers do so; returns what they have in them."""
    inside: set[int] = set()
    for child in _own_switches(module):
        # The name that it has since transformers 5.21, and the one before.
        enable = getattr(child, "activation_checkpointing_enable", child.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
        layers = list(child.modules())
        if any(_has_switched_on(layer) for layer in layers):
            inside |= {id(layer) for layer in layers}
    return inside


def _has_switched_on(module: nn.Module) -> bool:
    return module.__dict__.get(_OWN_SWITCH[0]) is True and _OWN_SWITCH[1] in module.__dict__


def _own_switches(module: nn.Module) -> Iterator[Any]:
    """The outermost modules that can switch on the checkpointing of their layers by themselves, as Hugging Face's models."""
    if getattr(module, "supports_gradient_checkpointing", False) and hasattr(module, "gradient_checkpointing_enable"):
        yield module
        return
    for child in module.children():
        yield from _own_switches(child)


def find_blocks(module: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks of a model, by qualified name: of the outermost nn.ModuleLists and nn.Sequentials with several children
    of one class that hold layers themselves, these children; without any, those of nn.ModuleDicts.
    """
    # A dict holds parts of a model more often than its blocks.
    return _repeated(module, (nn.ModuleList, nn.Sequential)) or _repeated(module, (nn.ModuleDict,))


def _repeated(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for name, stack in module.named_modules():
        if not isinstance(stack, kinds) or any(f"{name}.".startswith(f"{block}.") for block in found):
            continue
        # With second names: a block that is there twice is a repeated one.
        blocks = {leaf: child for leaf, child in stack._modules.items() if child is not None and _is_block(child)}
        counts = Counter(type(_uncompiled(child)) for child in blocks.values())
        for leaf, child in blocks.items():
            if counts[type(_uncompiled(child))] > 1 and not any(child is block for block in found.values()):
                found[f"{name}.{leaf}" if name else leaf] = child
    return found


def _is_block(module: nn.Module) -> bool:
    """Whether a module is called and has layers of its own."""
    inner = _uncompiled(module)
    return _is_called(inner) and any(True for child in inner.children() for _ in child.parameters())


def _is_called(module: nn.Module) -> bool:
    """Whether a module has a forward; nn.ModuleList and nn.ModuleDict only hold others."""
    return type(module).forward is not nn.Module.forward


def _uncompiled(module: nn.Module) -> nn.Module:
    """The module behind what `torch.compile` has made of it."""
    return getattr(module, "_orig_mod", module)


def _named(module: nn.Module, names: BlockNames) -> dict[str, nn.Module]:
    children = dict(module.named_modules())
    found: dict[str, nn.Module] = {}
    for wanted in (names,) if isinstance(names, str) else names:
        chosen = {name: child for name, child in children.items() if name and _is_of_class(_uncompiled(child), wanted)}
        # A compiled module holds the one that it was made of.
        chosen = {name: child for name, child in chosen.items() if not name.endswith("._orig_mod")}
        if not chosen:
            known = sorted({type(child).__name__ for name, child in children.items() if name and _is_block(child)})
            raise UnsupportedError(
                f"`activation_checkpointing_policy` names {wanted!r}, but {type(module).__name__} holds no module of that class; "
                f"its modules with layers are of the classes {', '.join(known)}."
            )
        found.update(chosen)
    return found


def _is_of_class(module: nn.Module, wanted: str | type[nn.Module]) -> bool:
    """Whether a module, one that is called, is of a class or, by its name, of one that inherits from it."""
    if not _is_called(module):
        return False
    if not isinstance(wanted, str):
        return isinstance(module, wanted)
    return any(wanted in (kind.__name__, f"{kind.__module__}.{kind.__qualname__}") for kind in type(module).__mro__)
