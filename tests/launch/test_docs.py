"""What docs/ and README.md name exists: files, links, symbols, imports, settings, flags, presets, metrics."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from cluster.rpc.codec.error_status import TABLE
from launch.training.train_metrics import COUNTERS, GAUGES
from tests.launch.test_advice import DOTTED, KNOWN, SECTIONS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "bench" / "RESULTS.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("parallel", "tp_decoders", "cluster", "launch", "configs", "tests", "bench")
FILES = {path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")}
SOURCE = re.compile(r"(?<![\w/.<~-])((?:[\w-]+/)*[\w-]+\.(?:py|cpp|h|sh|proto|yaml))\b(?!/)")
OTHERS = {"parallel.py", "monitor.py", "llama.cpp"}  # a user's own, Ray's, and a project
SYMBOL = re.compile(r"`([\w/]+\.(?:py|cpp|h)): ([\w., ]+)`")
COMMAND = re.compile(r"tp-decoders ([a-z]+)\b([^`\n#']*)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
PRESET = re.compile(r"--(config|preset|cluster) ([a-z0-9][\w.-]*)(?= |$)", re.MULTILINE)
PLACES = {"config": ("training", "models"), "preset": ("engine",), "cluster": ("cluster",)}


def found(name: str) -> list[str]:
    """The files of that path, or of as much of its end as is given."""
    return [path for path in FILES if path == name or path.endswith(f"/{name}")]


def defined(path: Path) -> set[str]:
    """What a file defines, members behind their class's name; of C++ its words."""
    if path.suffix != ".py":
        return set(re.findall(r"\w+", path.read_text(encoding="utf-8")))
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        of_node = set(_names(node))
        names |= of_node
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{name}" for inner in node.body for name in _names(inner)}
    return names


def _names(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node.name
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    for target in targets:
        yield from (part.id for part in ast.walk(target) if isinstance(part, ast.Name))


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.strip().lower()).replace(" ", "-") for head in heads}


def pages(*left_out: str) -> list[object]:
    return [pytest.param(page, id=page.name) for page in PAGES if page.name not in left_out]


@pytest.mark.parametrize("page", pages("map.md"))
def test_every_source_file_that_a_page_names_exists(page: Path) -> None:
    named = set(SOURCE.findall(page.read_text(encoding="utf-8"))) - OTHERS
    assert not sorted(name for name in named if not found(name))


@pytest.mark.parametrize("page", pages())
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not link.startswith("http") and (not target.exists() or (anchor and anchor not in anchors(target))):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", pages())
def test_every_symbol_that_a_page_names_with_its_file_is_there(page: Path) -> None:
    unknown = []
    for name, symbols in SYMBOL.findall(page.read_text(encoding="utf-8")):
        paths = [path for path in found(name) if not path.startswith("tests/")]
        assert len(paths) == 1, f"{name}: {paths or 'no such file'}; name as much of its path as tells it apart"
        known = defined(ROOT / paths[0])
        unknown += [f"{name}: {symbol}" for symbol in symbols.split(", ") if symbol not in known]
    assert not unknown


@pytest.mark.parametrize("page", pages())
def test_python_examples_of_a_page_import(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = import_module(node.module or "")
                assert not [each.name for each in node.names if not hasattr(module, each.name)], node.module
            elif isinstance(node, ast.Import):
                for each in node.names:
                    import_module(each.name)


@pytest.mark.parametrize("page", pages("map.md"))
def test_every_setting_that_a_page_names_exists(page: Path) -> None:
    spans = re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))
    named = {name for span in spans for name in DOTTED.findall(span) if name.partition(".")[0] in SECTIONS}
    files = re.compile(r"\.(py|md|yaml|jsonl|pem|key|csr|ext)$")
    modules = {name for name in named if (ROOT / "/".join(name.split(".")[:2])).exists()}
    unknown = {name for name in named - KNOWN - modules if not files.search(name)}
    assert not unknown - {"engine.max_sequence", "engine.step"}  # a mistake on purpose; a span of a trace


def flags() -> dict[str, set[str]]:
    """By command, from its printed help."""
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    return {part.split("\n", 1)[0]: set(FLAG.findall(part)) for part in text.split("\n## tp-decoders ")[1:]}


@pytest.mark.parametrize("page", pages("commands.md"))
def test_every_command_of_a_page_has_its_flags_and_presets(page: Path) -> None:
    known, text = flags(), page.read_text(encoding="utf-8")
    used = [(name, flag) for name, rest in COMMAND.findall(text) if name in known for flag in FLAG.findall(rest)]
    assert not [(name, flag) for name, flag in used if flag not in known[name]]
    presets = [
        (kind, name) for name_, rest in COMMAND.findall(text) if name_ in known for kind, name in PRESET.findall(rest)
    ]
    assert not [name for kind, name in presets if not any(found(f"configs/{f}/{name}.yaml") for f in PLACES[kind])]


def test_every_metric_is_on_its_page() -> None:
    source = (ROOT / "launch" / "observe" / "prometheus_metrics.py").read_text(encoding="utf-8")
    names = set(re.findall(r'(?:gauge|counter|histogram)\("(\w+)"', source)) | set(
        re.findall(r': \("(\w+)", "', source)
    )
    names |= {name for name, _ in (GAUGES | COUNTERS).values()}
    page = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8")
    shown = {name.removesuffix("_total") for name in re.findall(r"`(\w+)(?:\{[\w,]+\})?`", page)}
    assert len(names) > 50 and not names - shown


def test_every_reason_of_an_error_is_on_a_page() -> None:
    text = "".join((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("serving", "security"))
    assert not [row.reason for row in TABLE if f"`{row.reason}`" not in text]


def test_the_rooms_are_drawn_as_the_contracts_have_them() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    ordered = [each for each in contracts if each["type"] == "layers" and "containers" in each]
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    lines = {" ".join(line.split()) for line in page.splitlines()}
    assert ordered
    assert not [
        each["name"] for each in ordered if f"{each['containers'][0]} {' > '.join(each['layers'])}" not in lines
    ]
