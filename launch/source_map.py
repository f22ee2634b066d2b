"""docs/map.md: every folder of the source with what lives there, every file with its first sentence, read from them.

`python -m launch.reference map > docs/map.md` prints it. Generated code is left out.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from launch import ROOT

PACKAGES = ("parallel", "tp_decoders", "cluster", "launch")
KINDS = (".py", ".cpp", ".h", ".proto")
HEAD = """# Map of the source

Printed from the code (`python -m launch.reference map > docs/map.md`): every folder with what lives there and what does
not, every file with the first sentence of what it says of itself. How they work together is in
[architecture.md](architecture.md). Imports go down within a folder, never in a circle (contracts in `pyproject.toml`).
"""


def source_map(root: Path = ROOT) -> str:
    """The page."""
    return HEAD + "".join(part for package in PACKAGES for part in _folder(root / package, root))


def _folder(folder: Path, root: Path) -> Iterator[str]:
    """A folder's own section, then those of the folders in it."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix in KINDS and "_pb2" not in path.name]
    if files:
        yield f"\n## {folder.relative_to(root)}/\n"
        if said := _paragraph(folder / "__init__.py"):
            yield f"\n{said}\n"
        lines = [f"- `{path.name}`: {_sentence(path)}\n" for path in files if path.name != "__init__.py"]
        if lines:
            yield "\n" + "".join(lines)
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] not in "_."):
        yield from _folder(inner, root)


def _paragraph(path: Path) -> str:
    """What a file says first: of Python the docstring's first paragraph, else that of the comment at its head."""
    if not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        said = ast.get_docstring(ast.parse(text)) or ""
    else:
        lines = [line for line in text.splitlines() if not line.startswith("#pragma")]
        ends = next((i for i, line in enumerate(lines) if not line.startswith("//")), len(lines))
        said = "\n".join(line.removeprefix("//").strip() for line in lines[:ends])
    return " ".join(said.split("\n\n")[0].split())


def _sentence(path: Path) -> str:
    return re.split(r"(?<=\.)\s", _paragraph(path), maxsplit=1)[0]
