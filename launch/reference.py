"""The reference pages of docs/, printed from the code: `python -m launch.reference settings > docs/settings.md`, the
same with `commands` and `map`. A test compares them with what is committed.
"""

from __future__ import annotations

import argparse
import inspect
import io
import os
import re
import sys
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from importlib import import_module
from typing import Any, get_args, get_type_hints
from unittest.mock import patch

from cluster.training.data.corpus.sources import KINDS
from launch.main import COMMANDS, parser_of
from launch.source_map import source_map
from parallel.native.compiled import instruction_set

WIDTH = 100
ISA = f"`{instruction_set.VARIABLE}`, one of {', '.join(instruction_set.NAMES)}"
SETTINGS = f"""# Settings

Printed from the code (`python -m launch.reference settings > docs/settings.md`). Every setting of `tp-decoders serve`
and `tp-decoders train` can stand in a preset (YAML, strict: what is unknown is refused) and on the command line as
`name.name=value`, anywhere among the options. Values are read as YAML 1.2 reads them: `1e-3` is a number, `null` is
none, `[a, b]` is a list. Later ones win: presets, then flags, then overrides.

The environment forces the CPU kernels' instruction set by {ISA}:
see [numerics.md](numerics.md#instruction-sets).
"""
CORPUS = """
## What a corpus may be

`corpus.path` is a file or a folder; a folder is read with all below it, in the order of the names, and holds one kind.

| file name | kind (`corpus.kind`) | settings that apply |
| --- | --- | --- |
{rows}

A folder that `datasets.save_to_disk` wrote is read as a table; `corpus.dataset_split` names its split.
"""
APPLIES = {
    "text": "`corpus.encoding`, `corpus.separator`",
    "jsonl": "`corpus.encoding`, `corpus.field`, `corpus.prompt_field`",
    "csv": "`corpus.encoding`, `corpus.field`, `corpus.prompt_field`",
    "table": "`corpus.field`, `corpus.prompt_field`, `corpus.dataset_split`",
}
COMMANDS_PAGE = """# Commands

Printed from the code (`python -m launch.reference commands > docs/commands.md`): what each command's `--help` says.

Exit status 0: done; 1: failed; 2: bad input; 130: interrupted.
"""


def settings() -> str:
    """Every setting of both commands: name, type, default, what it is."""
    from launch.serving.serve_config import ServeConfig
    from launch.training.train_config import TrainConfig

    parts = [SETTINGS, "\n## tp-decoders serve\n", *_sections(ServeConfig, "")]
    parts += ["\n## tp-decoders train\n", *_sections(TrainConfig, "")]
    rows = "\n".join(f"| `*{suffix}` | {kind} | {APPLIES[kind]} |" for suffix, kind in KINDS.items())
    return "\n".join(parts) + CORPUS.format(rows=rows)


def _sections(kind: type[Any], prefix: str) -> Iterator[str]:
    """A table of a dataclass's own settings, then one for each that is nested in it."""
    hints, notes = get_type_hints(kind), _comments(kind)
    inner = {field.name: found for field in fields(kind) if (found := _nested(hints[field.name])) is not None}
    own = [field for field in fields(kind) if field.name not in inner]
    if own:
        yield f"\n**{prefix.rstrip('.') or 'on top'}**: {_sentence(kind)}\n"
        yield "| setting | type | default | |\n| --- | --- | --- | --- |"
        for field in own:
            name, note = f"{prefix}{field.name}", notes.get(field.name, "").replace("|", "\\|")
            yield f"| `{name}` | {_type(hints[field.name])} | {_default(field)} | {note} |"
    for name, nested in inner.items():
        yield from _sections(nested, f"{prefix}{name}.")


def _nested(hint: Any) -> type[Any] | None:
    return next((each for each in (hint, *get_args(hint)) if isinstance(each, type) and is_dataclass(each)), None)


def _sentence(kind: type[Any]) -> str:
    return " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())


def _type(hint: Any) -> str:
    words = hint.__name__ if isinstance(hint, type) and not get_args(hint) else re.sub(r"\b\w+\.", "", str(hint))
    words = re.sub(r"Literal\[([^\]]*)\]", lambda found: found[1].replace("'", "").replace(", ", " or "), words)
    words = re.sub(r"Optional\[(.*)\]$", r"\1 or null", words)
    return words.replace(" | None", " or null").replace("tuple[str, ...]", "list of str").replace("|", "or")


def _default(field: Field[Any]) -> str:
    if field.default is not MISSING:
        value = field.default
    elif field.default_factory is not MISSING:
        value = field.default_factory()
    else:
        return "(must be given)"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"


def _comments(kind: type[Any]) -> dict[str, str]:
    """The comment behind each field's line, those of its bases included."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        lines: dict[int, str] = {}
        names: dict[int, str] = {}
        source = inspect.cleandoc(inspect.getsource(base))
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            line = token.start[0]
            if token.type == tokenize.COMMENT:
                lines[line] = token.string.lstrip("# ").removeprefix("type: ignore")
            elif token.type == tokenize.NAME and line not in names:
                names[line] = token.string
        found |= {name: lines[line] for line, name in names.items() if line in lines}
    return found


def commands() -> str:
    """The help of every command."""
    parts = [COMMANDS_PAGE]
    with patch.dict(os.environ, {"COLUMNS": str(WIDTH)}):
        for name in COMMANDS:
            parts.append(f"## tp-decoders {name}\n\n```\n{_help(parser_of(name), name)}```\n")
    return "\n".join(parts)


def _help(parser: argparse.ArgumentParser, name: str) -> str:
    """What --help prints, with that of the sub-commands behind it."""
    chosen = _choices(parser)[name]
    inner = [sub.format_help() for sub in _choices(chosen).values()]
    return "\n".join([chosen.format_help(), *inner])


def _choices(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    actions = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return next((dict(action.choices) for action in actions), {})


PAGES: dict[str, Callable[[], str]] = {"settings": settings, "commands": commands, "map": source_map}

if __name__ == "__main__":
    import_module("launch.main")
    if len(sys.argv) != 2 or sys.argv[1] not in PAGES:
        sys.exit(f"usage: python -m launch.reference {'|'.join(PAGES)}")
    sys.stdout.write(PAGES[sys.argv[1]]())
