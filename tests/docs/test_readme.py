"""What the documents say is true: commands, links, versions, tables and the picture of the axes."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_ted
from lightning_ted.tensor_parallel.plan import STYLES
from lightning_ted.topology import AXIS_NAMES, Topology

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*/README.md"))]
#: Made by the command that the document names beside it.
MADE = {"benchmarks/results/step.json"}

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(text: str, language: str) -> Iterator[str]:
    """The fenced blocks of one language; ``""`` for those without."""
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if found[1] == language:
            yield found[2]


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def table(text: str, header: str) -> list[list[str]]:
    """The cells of the table whose first column is called ``header``."""
    after = text.split(f"| {header} |", 1)[1].splitlines()[2:]
    rows = []
    for line in after:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


def test_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 200


@each_document
def test_make_commands_are_targets(document: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = document.read_text()
    named = set(re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE))
    assert named <= targets


def test_readme_names_the_two_commands() -> None:
    assert {"make quickstart", "make test"} <= set(re.findall(r"^make \w+", README.read_text(), re.MULTILINE))


@each_document
def test_python_blocks_compile(document: Path) -> None:
    for block in blocks(document.read_text(), "python"):
        ast.parse(block)


@each_document
def test_names_that_python_blocks_import_exist(document: Path) -> None:
    for block in blocks(document.read_text(), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_ted"):
                home = __import__(node.module or "", fromlist=["_"])
                assert all(hasattr(home, alias.name) for alias in node.names), ast.unparse(node)


@each_document
def test_relative_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document.read_text())):
        if "://" not in target and not target.startswith("#"):
            assert (document.parent / target.split("#")[0]).exists(), target


@each_document
def test_files_that_are_named_exist(document: Path) -> None:
    for name in re.findall(
        r"\w[\w.-]*(?:/[\w.*-]+)+\.(?:py|yaml|json|md)\b", re.sub(r"\w+://\S+", "", document.read_text())
    ):
        places = (ROOT, ROOT / "lightning_ted", document.parent)
        assert name in MADE or any(any(place.glob(name)) for place in places), name


def test_versions_agree() -> None:
    # Not tomllib, which Python 3.10 has not.
    project = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert project and newest
    assert project[1] == newest[1] == lightning_ted.__version__


@pytest.mark.parametrize("requirement", ["torch", "lightning", "Python"])
def test_readme_names_the_oldest_versions(requirement: str) -> None:
    project = (ROOT / "pyproject.toml").read_text()
    name = "requires-python = " if requirement == "Python" else ""
    oldest = re.search(rf'{name}"{"" if name else requirement}>=([\d.]+)"', project)
    assert oldest
    assert f"{requirement} {oldest[1]} or later" in README.read_text()


def test_table_of_styles_is_complete() -> None:
    named = [re.sub(r"[`:\d]", "", row[0]) for row in table(README.read_text(), "style")]
    assert named == sorted(named, key=list(STYLES).index)
    assert set(named) == set(STYLES)


def test_table_of_arguments_is_complete_and_its_defaults_are_right() -> None:
    from lightning_ted import TEDStrategy

    parameters = dict(inspect.signature(TEDStrategy.__init__).parameters)
    del parameters["self"]
    rows = table((ROOT / "docs" / "strategy.md").read_text(), "argument")
    assert [row[0].strip("`") for row in rows] == list(parameters)
    for name, default, *_ in rows:
        if default.startswith("`"):
            assert ast.literal_eval(default.strip("`")) == parameters[name.strip("`")].default, name
    assert parameters["timeout"].default.total_seconds() == 30 * 60


def test_properties_that_are_named_exist() -> None:
    from lightning_ted import TEDStrategy

    for row in table((ROOT / "docs" / "strategy.md").read_text(), "property"):
        for name in re.findall(r"`(\w+)`", row[0]):
            assert isinstance(getattr(TEDStrategy, name), property), name


def test_picture_of_the_axes_is_the_topology() -> None:
    topology = Topology(8, tensor=2, expert=2, expert_tensor=2)
    (picture,) = (block for block in blocks(README.read_text(), "") if "expert_tensor" in block)
    drawn = {}
    for name, size, groups in re.findall(r"(\w+) \((\d)\) +((?:\[[\d ]+\] ?)+)", picture):
        assert int(size) == topology.size(name), name
        drawn[name] = tuple(tuple(map(int, group.split())) for group in re.findall(r"\[([\d ]+)\]", groups))
    expected = {name: topology.groups(name) for name in AXIS_NAMES if name != "world"}
    assert drawn == expected
