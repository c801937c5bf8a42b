"""The private names of Lightning that the strategy needs are there, and are imported in one file only."""

from __future__ import annotations

import ast
from pathlib import Path

import lightning_ted
from lightning_ted.strategy import _compat

PACKAGE = Path(lightning_ted.__file__).parent
#: Public types under a name with an underscore.
ALLOWED = {"_PATH"}


def test_every_private_name_is_there() -> None:
    assert all(getattr(_compat, name) is not None for name in _compat.__all__)


def test_private_names_of_lightning_are_imported_in_one_file_only() -> None:
    found = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lightning":
                private = {alias.name for alias in node.names if alias.name.startswith("_")} - ALLOWED
                if private and file.name != "_compat.py":
                    found.append(f"{file.relative_to(PACKAGE)}: {', '.join(private)}")
    assert not found
