"""The modules of a model that are recomputed: found or named, and switched in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

from torch import nn

from lightning_ted.errors import UnsupportedError
from lightning_ted.recompute.checkpoint import RecomputeOptions, checkpointed

#: Classes of modules, or their names, alone or with their module's.
BlockNames = Collection[str | type[nn.Module]]

_OPTIONS = "_ted_recompute"
_BEFORE = "_ted_recompute_before"
#: What Hugging Face's layers ask while training: whether to be checkpointed, and by which function.
_OWN_SWITCH = ("gradient_checkpointing", "_gradient_checkpointing_func")


class _Recomputed:
    """Mixed into the class of a block: its call, hooks included, is recomputed in backward."""

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return checkpointed(self.__dict__[_OPTIONS], super().__call__, *args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The mixed class has no name that an unpickler could find.
        mixed, base = type(self), _base(type(self))
        reduced = super().__reduce_ex__(protocol)
        assert isinstance(reduced, tuple)
        make, args, *rest = reduced
        args = tuple(base if arg is mixed else arg for arg in args)
        return (_remade, (base, base if make is mixed else make, args), *rest)


_mixed: dict[type, type] = {}


def _mix(base: type) -> type:
    if base not in _mixed:
        names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
        _mixed[base] = type(base.__name__, (_Recomputed, base), names)
    return _mixed[base]


def _base(mixed: type) -> type:
    return mixed.__mro__[2]


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
    if not blocks:
        raise UnsupportedError(
            f"`activation_checkpointing={options.mode!r}` finds no nn.ModuleList or nn.Sequential of equal blocks in "
            f"{type(module).__name__}; name the classes of what is to be recomputed in `activation_checkpointing_policy`, or leave "
            "`activation_checkpointing` out."
        )
    return list(blocks)


def _switch(block: nn.Module, options: RecomputeOptions) -> None:
    own = hasattr(block, _OWN_SWITCH[0]) and type(block).__call__ is not nn.Module.__call__
    if own and _uncompiled(block) is block:
        # Hugging Face's layers have a switch of their own, which leaves out caches of keys and values as well.
        block.__dict__.update(gradient_checkpointing=True, _gradient_checkpointing_func=partial(checkpointed, options))
    else:
        block.__dict__[_OPTIONS] = options
        block.__class__ = _mix(type(block))


def _switch_back(block: nn.Module) -> None:
    if isinstance(block, _Recomputed):
        del block.__dict__[_OPTIONS]
        block.__class__ = _base(type(block))
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
        child.gradient_checkpointing_enable({"use_reentrant": False})
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
    """The repeated blocks of a model, by qualified name: of the outermost nn.ModuleLists and nn.Sequentials with several
    children of one class that hold layers themselves, these children.
    """
    found: dict[str, nn.Module] = {}
    for name, stack in module.named_modules():
        if not isinstance(stack, (nn.ModuleList, nn.Sequential)) or any(f"{name}.".startswith(f"{f}.") for f in found):
            continue
        blocks = [(leaf, child) for leaf, child in stack.named_children() if _is_block(child)]
        # A block that is there twice is a repeated one.
        counts = Counter(type(_uncompiled(child)) for child in stack if _is_block(child))
        for leaf, child in blocks:
            if counts[type(_uncompiled(child))] > 1:
                found[f"{name}.{leaf}" if name else leaf] = child
    return found


def _is_block(module: nn.Module) -> bool:
    """Whether a module is called and has layers of its own."""
    inner = _uncompiled(module)
    called = type(inner).forward is not nn.Module.forward and not isinstance(inner, nn.ModuleList)
    return called and any(True for child in inner.children() for _ in child.parameters())


def _uncompiled(module: nn.Module) -> nn.Module:
    """The module behind what `torch.compile` has made of it."""
    return getattr(module, "_orig_mod", module)


def _named(module: nn.Module, names: BlockNames) -> dict[str, nn.Module]:
    children = dict(module.named_modules())
    found: dict[str, nn.Module] = {}
    for wanted in names:
        chosen = {name: child for name, child in children.items() if name and _is_called(_uncompiled(child), wanted)}
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


def _is_called(module: nn.Module, wanted: str | type[nn.Module]) -> bool:
    """Whether a module is of a class or, by its name, of one that inherits from it."""
    if not isinstance(wanted, str):
        return isinstance(module, wanted)
    return any(wanted in (kind.__name__, f"{kind.__module__}.{kind.__qualname__}") for kind in type(module).__mro__)
