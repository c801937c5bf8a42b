"""Fixtures for every test, and what a test may have left behind in this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

from tests.support.mortals import Mortals
from tests.support.pool import Pools


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    """``pools(4).run(function, *args)`` calls a module-level function on each of four ranks."""
    pools = Pools()
    yield pools
    pools.close()


@pytest.fixture(scope="module")
def mortals() -> Iterator[Mortals]:
    """``mortals.run(2, function, *args)`` calls a module-level function in two new processes, which may die."""
    with Mortals() as mortals:
        yield mortals


@pytest.fixture(autouse=True)
def _restore_environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    # pytest itself writes the name of the running phase here.
    after = {key: value for key, value in os.environ.items() if key != "PYTEST_CURRENT_TEST"}
    for key in after.keys() - before.keys():
        del os.environ[key]
    for key, value in before.items():
        if key != "PYTEST_CURRENT_TEST" and os.environ.get(key) != value:
            os.environ[key] = value


@pytest.fixture(autouse=True)
def _restore_rank_zero() -> Iterator[None]:
    before = _rank_zero_ranks()
    yield
    for module in _rank_zero_ranks():
        sys.modules[module].rank_zero_only.rank = before.get(module, 0)


def _rank_zero_ranks() -> dict[str, int]:
    # Looked up, not imported: most unit tests never load Lightning, and it takes seconds.
    names = ("lightning_utilities.core.rank_zero", "lightning.fabric.utilities.rank_zero")
    found = {name: sys.modules[name].rank_zero_only for name in names if name in sys.modules}
    return {name: only.rank for name, only in found.items() if getattr(only, "rank", None) is not None}


@pytest.fixture(autouse=True)
def _destroy_process_group() -> Iterator[None]:
    yield
    if "torch" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
