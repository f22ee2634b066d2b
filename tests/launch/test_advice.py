"""What an error tells the user to set can be set: every dotted name in a message is a setting of a command."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from launch.serving.serve_config import ServeConfig
from launch.training.train_config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("parallel", "tp_decoders", "cluster", "launch")
DOTTED = re.compile(r"\b([a-z_]+(?:\.[a-z_0-9]+)+)\b(?!\()")


def settings(kind: type[Any], before: str = "") -> Iterator[str]:
    """All dotted names of a dataclass, sections included."""
    hints = get_type_hints(kind)
    for each in fields(kind):
        name = f"{before}{each.name}"
        yield name
        for inner in (hints[each.name], *get_args(hints[each.name])):
            if is_dataclass(inner):
                yield from settings(inner, f"{name}.")  # type: ignore[arg-type]


KNOWN = {*settings(ServeConfig), *settings(TrainConfig)}
SECTIONS = {name.partition(".")[0] for name in KNOWN if "." in name}


def messages(path: Path) -> Iterator[tuple[int, str]]:
    """The text of every raised error, its holes left out."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) and node.exc is not None:
            for part in ast.walk(node.exc):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield node.lineno, part.value


def is_module(name: str) -> bool:
    """Whether it begins with a module of ours: an error for programmers, as in parallel.ranks.mesh.init_groups."""
    first, second, *_ = name.split(".")
    here = ROOT / first / second
    return first in PACKAGES and (here.is_dir() or here.with_suffix(".py").is_file())


@pytest.mark.parametrize("package", PACKAGES)
def test_every_setting_that_an_error_names_exists(package: str) -> None:
    unknown = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for line, text in messages(path)
        for name in DOTTED.findall(text)
        if name.partition(".")[0] in SECTIONS and name not in KNOWN and not is_module(name)
    ]
    assert not unknown, unknown


def test_the_names_of_both_commands_are_known() -> None:
    assert {"engine.kv_blocks", "corpus.split.eval_fraction", "server.tls.cert"} <= KNOWN
