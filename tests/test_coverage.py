"""docs/coverage.md is the table of coverage_rows.py, and every test that the table names exists."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.coverage_rows import FAMILIES, ROWS, page

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def collected() -> set[str]:
    """The ids of all tests in the files that the table names."""
    files = sorted({row.test.split("::")[0] for row in ROWS})
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", *files]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert listed.returncode == 0, listed.stdout[-2000:]
    return {line for line in listed.stdout.splitlines() if "::" in line}


def test_every_named_test_exists(collected: set[str]) -> None:
    missing = {test for row in ROWS for test in row.tests() if test not in collected}
    assert not missing, "\n".join(sorted(missing))


def test_no_cell_is_empty() -> None:
    for row in ROWS:
        assert row.ids and set(row.ids) <= set(FAMILIES), row
        assert all(row.cell(family).strip() for family in FAMILIES), row
        assert not set(row.ids) & set(row.why), f"{row.what}: shown and excused"


def test_the_page_is_the_table() -> None:
    written = (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8")
    assert written == page(), "python -m tests.coverage_rows > docs/coverage.md"
