"""The printed pages of docs/ are those that the code prints now, and every setting and format is on them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.training.data.corpus.sources import KINDS, SourceOptions
from launch.reference import APPLIES, PAGES
from parallel.errors import ConfigError
from tests.launch.test_advice import KNOWN

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("page", PAGES)
def test_a_printed_page_is_current(page: str) -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "launch.reference", page], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    committed = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    assert committed == printed, f"python -m launch.reference {page} > docs/{page}.md"


def test_every_setting_is_on_the_page_with_what_it_is() -> None:
    rows = [line for line in PAGES["settings"]().splitlines() if line.startswith("| `")]
    named = {row.split("`")[1] for row in rows}
    inner = {name for name in KNOWN if any(other.startswith(f"{name}.") for other in KNOWN)}
    assert KNOWN - inner <= named
    assert not [row for row in rows if row.endswith("|  |")], "a setting without a word of what it is"


@pytest.mark.parametrize("kind", sorted(set(KINDS.values())))
def test_the_settings_said_to_apply_to_a_kind_of_corpus_do(kind: str) -> None:
    for name in ("encoding", "separator", "field", "prompt_field", "split"):
        shown = f"`corpus.{'dataset_split' if name == 'split' else name}`" in APPLIES[kind]
        try:
            SourceOptions(**{name: "x"}).check(kind)
            assert shown, name
        except ConfigError:
            assert not shown, name
