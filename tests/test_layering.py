"""The package's floors: what each part may import, where torch may not be loaded, and who alone communicates."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_ted"

_MESH = {"errors", "topology", "layout", "mesh"}
_COLLECTIVES = _MESH | {"collectives"}
_MOE = _COLLECTIVES | {"tensor_parallel", "recompute"}
_RING = _MOE | {"moe", "optim", "checkpoint", "adapters", "strategy", "callbacks", "plan"}

#: What each file or folder of the package may import, besides itself. Imports inside functions count as well.
LADDER = {
    "errors": set(),
    "topology": {"errors"},
    "layout": {"errors", "topology"},
    "mesh": {"errors", "topology", "layout"},
    "collectives": _MESH,
    "tensor_parallel": _COLLECTIVES,
    "recompute": _COLLECTIVES,
    "moe": _MOE,
    "optim": _COLLECTIVES,
    "progress": set(),
    "checkpoint": _COLLECTIVES | {"optim", "progress"},
    "adapters": _MOE | {"moe", "checkpoint", "progress"},
    "strategy": _MOE | {"moe", "optim", "checkpoint", "adapters"},
    "callbacks": _COLLECTIVES | {"moe", "optim", "checkpoint", "adapters"},
    "plan": {"errors", "topology"},
    "simulate": _RING,
    "verify": _RING,
    "convert": _RING | {"progress"},
    "inspection": _RING | {"progress"},
    "cli": _RING | {"simulate", "verify", "convert", "inspection", "lightning_ted"},
    "__main__": {"cli"},
    # The front door imports names only when they are used; what it loads at once is tested below.
    "lightning_ted": _RING,
}

#: Parts that hold arithmetic alone.
WITHOUT_TORCH = ("errors", "topology", "plan")
_HEAVY = {"torch", "lightning", "lightning_fabric", "pytorch_lightning", "torchmetrics", "transformers", "numpy"}

#: The only parts that may call torch's collectives.
COMMUNICATING = {"collectives", "mesh", "checkpoint", "strategy"}
_COLLECTIVE_NAMES = {
    "all_gather",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "batch_isend_irecv",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "irecv",
    "isend",
    "monitored_barrier",
    "new_group",
    "new_subgroups",
    "new_subgroups_by_enumeration",
    "recv",
    "recv_object_list",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "scatter_object_list",
    "send",
    "send_object_list",
    "split_group",
}
#: Modules and operator namespaces in which everything communicates.
_COLLECTIVE_HOMES = (
    "torch.distributed._functional_collectives",
    "torch.distributed.nn",
    "torch.ops._c10d_functional",
    "torch.ops.c10d",
    "torch.ops.c10d_functional",
)

FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(file: Path) -> str:
    """The rung that a file belongs to."""
    first = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "lightning_ted" if first == "__init__" else first


def imported_names(tree: ast.AST, file: Path) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything that a module imports."""
    package = file.relative_to(PACKAGE.parent).with_suffix("").parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *filter(None, [node.module])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def rung(name: str) -> str | None:
    """The rung that an imported name leads to; None outside this package, and for the version."""
    parts = name.split(".")
    if parts[0] != "lightning_ted" or name == "lightning_ted.__version__":
        return None
    if len(parts) > 1 and any((PACKAGE / f"{parts[1]}{suffix}").exists() for suffix in (".py", "")):
        return parts[1]
    return "lightning_ted"


def ladder_breaks(source: str, file: Path) -> list[str]:
    here = part_of(file)
    allowed = LADDER[here] | {here}
    found = ((line, name, rung(name)) for line, name in imported_names(ast.parse(source), file))
    return [f"line {line} imports {name}" for line, name, to in found if to is not None and to not in allowed]


def collective_uses(source: str) -> list[str]:
    """Imports and uses of torch's collectives, under whatever name the module gives to ``torch.distributed``."""
    tree = ast.parse(source)
    known: dict[str, str] = {}
    found: set[tuple[int, str]] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                # Without `as`, an import of a.b binds a.
                name = alias.name if alias.asname else alias.name.split(".")[0]
                known[alias.asname or name] = name
                found.add((node.lineno, alias.name))
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                found.add((node.lineno, f"{node.module}.{alias.name}"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            chain, at = [node.attr], node.value
            while isinstance(at, ast.Attribute):
                chain.append(at.attr)
                at = at.value
            if isinstance(at, ast.Name) and at.id in known:
                found.add((node.lineno, ".".join([known[at.id], *reversed(chain)])))
    return [f"line {line} uses {name}" for line, name in sorted(found) if communicates(name)]


def communicates(name: str) -> bool:
    if any(name == home or name.startswith(f"{home}.") for home in _COLLECTIVE_HOMES):
        return True
    return name.startswith("torch.distributed.") and name.rpartition(".")[2] in _COLLECTIVE_NAMES


def relative(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


def test_every_part_of_the_package_has_its_rung():
    assert {part_of(file) for file in FILES} <= LADDER.keys()


def test_the_ladder_only_leads_down():
    order = list(LADDER)
    for part, below in LADDER.items():
        if part in ("lightning_ted", "cli"):  # the front door stands outside, and the command may use it
            continue
        later = {other for other in below if order.index(other) >= order.index(part)}
        assert not later, f"{part} may import {later}, which stand no lower"


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_imports_lead_down_the_ladder(file):
    breaks = ladder_breaks(file.read_text(), file)
    assert not breaks, f"{relative(file)}: {breaks}; it may import {sorted(LADDER[part_of(file)])}"


@pytest.mark.parametrize("file", [file for file in FILES if part_of(file) in WITHOUT_TORCH], ids=relative)
def test_arithmetic_does_not_import_torch(file):
    heavy = [name for _, name in imported_names(ast.parse(file.read_text()), file) if name.split(".")[0] in _HEAVY]
    assert not heavy


@pytest.mark.parametrize("name", ["lightning_ted", "lightning_ted.topology", "lightning_ted.plan"])
def test_light_parts_load_without_torch_and_lightning(name):
    if name != "lightning_ted" and name.split(".")[1] not in {part_of(file) for file in FILES}:
        pytest.skip(f"{name} is not there")
    script = f"import sys, {name}; print(sorted({_HEAVY!r} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=PACKAGE.parent, timeout=60, check=False
    )
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


@pytest.mark.parametrize("file", [file for file in FILES if part_of(file) not in COMMUNICATING], ids=relative)
def test_only_the_parts_made_for_it_communicate(file):
    uses = collective_uses(file.read_text())
    assert not uses, f"{relative(file)}: {uses}; go through lightning_ted.collectives"


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist\ndist.all_reduce(x)",
        "import torch\ntorch.distributed.barrier()",
        "import torch.distributed\ntorch.distributed.all_to_all_single(x, y)",
        "from torch import distributed\nfunction = distributed.broadcast",
        "from torch.distributed import all_reduce as reduce_everywhere",
        "from torch.distributed.distributed_c10d import reduce_scatter_tensor",
        "import torch.distributed._functional_collectives as fc",
        "from torch.distributed import _functional_collectives",
        "from torch.distributed.nn.functional import all_gather",
        "import torch\ndef f(x):\n    return torch.ops._c10d_functional.all_reduce(x, 'sum', 'g')",
    ],
)
def test_the_search_finds_collectives(source):
    assert collective_uses(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist\ndist.is_initialized() and dist.get_rank()",
        "from torch.distributed import ProcessGroup",
        "from torch.distributed.tensor import DTensor",
        "from lightning_ted.collectives.primitives import all_reduce\nall_reduce(x)",
        "import torch\nx = torch.scatter(a, 0, b, c)",
    ],
)
def test_the_search_leaves_the_rest_alone(source):
    assert not collective_uses(source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("optim/norm.py", "from lightning_ted.moe import MoE"),
        ("callbacks/monitor.py", "def f():\n    from lightning_ted.strategy.ted import TEDStrategy"),
        ("moe/layer.py", "import lightning_ted.strategy"),
        ("moe/layer.py", "from ..strategy import ted"),
        ("moe/layer.py", "from lightning_ted import MoE"),
        ("collectives/tensor.py", "from lightning_ted import moe"),
        ("topology.py", "from lightning_ted.layout import Cut"),
    ],
)
def test_the_ladder_is_guarded(path, source):
    assert ladder_breaks(source, PACKAGE / path)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("moe/layer.py", "from lightning_ted.collectives.tokens import drop"),
        ("moe/layer.py", "from .experts import Experts"),
        ("moe/layer.py", "from ..mesh import Axis"),
        ("checkpoint/single_file.py", "from lightning_ted import __version__"),
    ],
)
def test_the_ladder_lets_pass_what_leads_down(path, source):
    assert not ladder_breaks(source, PACKAGE / path)
