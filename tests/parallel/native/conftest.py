from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from parallel.native.compiled import build, library
from tests.parallel.native.tiny import SOURCE


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of sources and an empty cache; the process's own library is put back afterwards."""
    if build.shutil.which("g++") is None:
        pytest.skip("no g++ here")
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "tiny.cpp").write_text(SOURCE)
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(library, "_loaded", library._Loaded())
    library.configure(cache_dir=tmp_path / "cache")
    yield tmp_path
