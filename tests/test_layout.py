"""The four packages are the ones of this checkout, and import only in one direction (the contracts are in
pyproject.toml)."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["parallel", "tp_decoders", "cluster", "launch"])
def test_a_package_is_the_one_of_this_checkout(name: str) -> None:
    module = import_module(name)
    assert Path(module.__file__ or "").is_relative_to(ROOT), f"{name} is imported from {module.__file__}"


def test_tests_are_not_packages() -> None:
    """A package tests/parallel would be imported instead of parallel."""
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("cluster.engine.engine_config", "ray"),
        ("cluster.frontend.frontend", "grpc"),
        ("cluster.frontend.frontend", "ray"),
        ("cluster.actors.group.worker", "ray"),
        ("launch.main", "torch"),
    ],
)
def test_importing_a_module_does_not_pull_in(module: str, absent: str) -> None:
    code = f"import sys, {module}; sys.exit({absent!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_no_file_shadows_ray_or_grpc() -> None:
    ours = (path for path in ROOT.rglob("*.py") if not path.relative_to(ROOT).parts[0].startswith(".venv"))
    shadows = [path for path in ours if path.stem in ("ray", "grpc")]
    assert not shadows
