"""``Trainer(strategy="ted")`` without importing torch or Lightning before they are wanted.

Lightning looks a strategy's name up in its registry when a ``Trainer`` is made, and offers no entry point for
strategies: somebody has to write the name into the registry. That is done at once where Lightning is loaded already,
and as soon as it loads where it is not. What is registered is a function that imports the strategy when a ``Trainer``
asks for it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

NAME = "ted"
DESCRIPTION = "Tensor + expert + data parallelism for mixture-of-experts models"

_REGISTRY_MODULE = "lightning.pytorch.strategies"


def create_strategy(**init_args: Any) -> Any:
    """What the registry calls for ``strategy="ted"``: a ``TEDStrategy``."""
    from lightning_ted.strategy.ted import TEDStrategy

    return TEDStrategy(**init_args)


def register(module: ModuleType) -> None:
    """Write the name into the registry of ``lightning.pytorch.strategies``, unless it is there."""
    registry = module.StrategyRegistry
    if NAME not in registry:
        registry.register(NAME, create_strategy, description=DESCRIPTION)


def register_lazily() -> None:
    """Register now where Lightning is loaded, else when it loads."""
    loaded = sys.modules.get(_REGISTRY_MODULE)
    if hasattr(loaded, "StrategyRegistry"):
        register(loaded)  # type: ignore[arg-type]
    elif not any(isinstance(finder, _OnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnImport())


class _OnImport(MetaPathFinder):
    """Finds nothing itself; waits for one module, lets the ordinary finder load it, then registers and is gone."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            register(module)

        # On this one loader object, made for this one module.
        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
