"""The files that go with a checkpoint's weights wherever these are written: tokenizer, chat templates, generation
settings.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "emoji.json",
    "chat_template.jinja",
    "chat_template.json",
)
COMPANIONS = ("generation_config.json", *TOKENIZER_FILES)
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt")
"""One of these is in every folder with a tokenizer."""
TEMPLATE_FOLDER = "additional_chat_templates"


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """What belongs to a folder's tokenizer and is there, by its place in it: vocabulary, settings, templates."""
    names = [
        *TOKENIZER_FILES,
        *(f"{TEMPLATE_FOLDER}/{path.name}" for path in (folder / TEMPLATE_FOLDER).glob("*.jinja")),
    ]
    return {name: folder / name for name in sorted(names) if (folder / name).is_file()}


def companions(folder: Path) -> dict[str, Path]:
    """What is copied along with the weights: generation settings and all that belongs to the tokenizer."""
    generation = {name: folder / name for name in COMPANIONS[:1] if (folder / name).is_file()}
    return {**generation, **tokenizer_files(folder)}


def copy_files(files: Mapping[str, Path], folder: Path) -> None:
    """Under the names given, which may have a folder of their own."""
    for name, path in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / name)
