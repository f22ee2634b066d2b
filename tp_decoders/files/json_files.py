"""Reading the small JSON files that lie beside a model's weights, whoever wrote them: bounded in size, one clear error.

Nothing of a file is believed before it was looked at: it must be a plain file (a pipe would never end), small, UTF-8,
JSON, an object, and say each key once.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parallel.errors import CheckpointError
from tp_decoders.files.git_lfs import refuse_pointer

MOST_BYTES = 32 * 2**20
"""Names of a hundred thousand labels are a few."""


def read_json_object(path: Path) -> dict[str, Any]:
    """The object a file holds."""
    text = _text(path)
    try:
        content = json.loads(text, object_pairs_hook=_each_key_once)
    except RecursionError as error:
        raise CheckpointError(f"{path} is nested too deeply to be a model's; mend or replace it") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} should hold a JSON object, not {type(content).__name__}")
    return content


def _text(path: Path) -> str:
    try:
        found = path.stat()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}; {_instead(path)}") from error
    except NotADirectoryError as error:
        raise CheckpointError(f"{path.parent} is a file; give the folder it lies in, {path.parent.parent}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is not a plain file; give the folder of a Hugging Face checkpoint")
    if found.st_size > MOST_BYTES:
        raise CheckpointError(f"{path} has {found.st_size} bytes, more than the {MOST_BYTES} a {path.name} may have")
    refuse_pointer(path)
    try:
        with path.open("rb") as file:
            return file.read(MOST_BYTES + 1).decode("utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error


def _instead(path: Path) -> str:
    """What to give where a folder has no config.json: what it holds often tells."""
    folder = path.parent
    if (folder / "adapter_config.json").is_file():
        return "it is an adapter: give it as --adapter, and its base model as --model"
    below = sorted(found.parent for found in folder.glob(f"*/{path.name}") if found.is_file())
    if below:
        newest = max(below, key=lambda folder: (folder / path.name).stat().st_mtime)
        return f"{len(below)} of the folders in it have one, {newest.name} the newest: give one of these"
    return "give the folder of a Hugging Face checkpoint, or its ORG/NAME on the hub"


def _each_key_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object's keys and values; a key given twice must say the same both times."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise ValueError(f"{key[:60]!r} is given twice with different values")
        found[key] = value
    return found
