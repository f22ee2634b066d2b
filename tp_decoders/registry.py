"""The families this project knows: one import and one entry each. A new family is its file, a line here and a row of
the parity test.
"""

from __future__ import annotations

import json
from pathlib import Path

from parallel.errors import CheckpointError, ConfigError
from tp_decoders.config import DecoderConfig
from tp_decoders.decoder import Family
from tp_decoders.families import gpt2, gpt_bigcode, gpt_neox, gpt_neox_japanese, mpt

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (gpt2.FAMILY, gpt_neox.FAMILY, gpt_neox_japanese.FAMILY, mpt.FAMILY, gpt_bigcode.FAMILY)
}


def family_of(model_type: object) -> Family:
    if model_type not in FAMILIES:
        raise ConfigError(
            f"model_type {model_type!r} is not one of this project's families: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[str(model_type)]


def config_from_hf(hf: dict[str, object]) -> DecoderConfig:
    """Reads the contents of a config.json, strictly."""
    return family_of(hf.get("model_type")).from_hf(hf)


def read_config(folder: str | Path) -> DecoderConfig:
    """Reads a checkpoint folder's config.json."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no config.json; give the folder of a Hugging Face checkpoint, or its ORG/NAME on the hub"
        )
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(hf, dict):
        raise CheckpointError(f"{path} should hold a JSON object, not {type(hf).__name__}")
    return config_from_hf(hf)
