"""Counting what is read on the host, each time a synchronisation on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor

_READING = ("tolist", "item", "__bool__", "__int__", "__index__", "__float__", "nonzero", "cpu", "numpy")


@contextmanager
def counted_reads() -> Iterator[list[str]]:
    """Gives the methods by which tensors have been read within the context, so far."""
    reads: list[str] = []

    def counting(name: str) -> Callable[..., Any]:
        method = getattr(Tensor, name)

        def read(self: Tensor, *args: Any) -> Any:
            reads.append(name)
            return method(self, *args)

        return read

    with pytest.MonkeyPatch.context() as patch:
        for name in _READING:
            patch.setattr(Tensor, name, counting(name))
        yield reads
