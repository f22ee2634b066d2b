"""A checkpoint to begin with: random weights of a shape that a preset gives, and a tokenizer's files beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parallel.errors import ConfigError


def write_random(shape: Mapping[str, Any], output: Path, seed: int = 0, dtype: str = "float32") -> int:
    """Writes config.json and safetensors; returns the number of parameters."""
    import torch

    from tp_decoders import build, initialise, save
    from tp_decoders.registry import config_from_hf

    model = initialise(build(config_from_hf(dict(shape), unread="refuse"), dtype=getattr(torch, dtype)), seed)
    save(model, output)
    return sum(parameter.numel() for parameter in model.parameters())


def copy_tokenizer(source: Path, output: Path) -> None:
    """The tokenizer's files of one checkpoint, into another's folder."""
    from tp_decoders.files.companion_files import copy_files

    copy_files(found_tokenizer(source), output)


def found_tokenizer(folder: Path) -> dict[str, Path]:
    """The tokenizer's files of a folder, which must hold one."""
    from tp_decoders.files.companion_files import VOCABULARIES, tokenizer_files

    files = tokenizer_files(folder)
    if not any(name in files for name in VOCABULARIES):
        raise ConfigError(f"{folder} holds none of {list(VOCABULARIES)}; give a folder with a tokenizer")
    return files
