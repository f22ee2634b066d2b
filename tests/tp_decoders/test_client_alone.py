"""The client library is installed and imported without the rest of the project, torch or Ray."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

CLIENT = Path(__file__).resolve().parents[2] / "tp_decoders" / "client"
PROJECT = tomllib.loads((CLIENT / "pyproject.toml").read_text(encoding="utf-8"))
PROVIDES = {
    "grpc": "grpcio", "grpc_health.v1": "grpcio-health-checking", "google.rpc": "googleapis-common-protos",
    "google.protobuf": "protobuf", "google.protobuf.internal": "protobuf",
}  # fmt: skip
CODE = """
import sys
sys.path.insert(0, sys.argv[1])
for name in ("torch", "ray", "numpy", "parallel", "cluster", "launch"):
    sys.modules[name] = None
from tp_decoders.client import AsyncClient, Client, Unavailable
import tp_decoders.client
assert tp_decoders.client.__file__.startswith(sys.argv[1])
with Client("127.0.0.1:1", retry_seconds=0) as client:
    try:
        client.generate("x", max_new_tokens=1, timeout=5)
    except Unavailable as error:
        print(error.code.name)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the wheel holds."""
    target = tmp_path_factory.mktemp("site")
    for source, place in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"].items():
        path, to = CLIENT / source, target / place
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(path, to) if path.is_dir() else shutil.copy(path, to)
    return target


def test_its_files_are_enough(installed: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", CODE, str(installed)], cwd=installed, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr, done.returncode) == ("UNAVAILABLE\n", "", 0)


def test_what_it_imports_is_what_it_depends_on(installed: Path) -> None:
    found = set()
    for path in installed.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            found |= {*names}
    outside = {name for name in found if name.partition(".")[0] not in {*sys.stdlib_module_names, "tp_decoders"}}
    needed = {PROVIDES[name if name in PROVIDES else name.rpartition(".")[0]] for name in outside}
    named = {each.partition(">")[0] for each in PROJECT["project"]["dependencies"]}
    assert needed <= named
