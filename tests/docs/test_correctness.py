"""Every test that the document on correctness names exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_tests_that_are_named_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "correctness.md").read_text()))
    there = {
        name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert len(named) > 40
    assert named <= there, f"not there: {sorted(named - there)}"
