"""The families this project knows: one import and one entry each. A new family is its file, a line here and a row of
the parity test.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from parallel.errors import ConfigError
from tp_decoders.families import gpt2, gpt_bigcode, gpt_neox, gpt_neox_japanese, llama, mpt
from tp_decoders.families.mpt_config import AUTO, REFERENCE, check_reference
from tp_decoders.files.json_fields import Fields, model_type_of, shown
from tp_decoders.files.json_files import read_json_object
from tp_decoders.model.config import DecoderConfig, check_sizes
from tp_decoders.model.decoder import Family

log = logging.getLogger(__name__)

Unread = Literal["warn", "refuse", "ignore"]
"""Of the keys of a config that nobody asked for: one warning names them, they are errors, or nothing is said."""

FAMILIES: dict[str, Family] = {
    model_type: family
    for family in (
        gpt2.FAMILY, gpt_neox.FAMILY, gpt_neox_japanese.FAMILY, mpt.FAMILY, gpt_bigcode.FAMILY, llama.FAMILY
    )
    for model_type in family.model_types
}  # fmt: skip


def family_of(model_type: object) -> Family:
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(
            f"model_type {shown(model_type)} is not one of this project's families: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]


def config_from_hf(hf: Mapping[str, Any], *, mpt_reference: str = AUTO, unread: Unread = "warn") -> DecoderConfig:
    """Reads the contents of a config.json. `unread`: what becomes of keys that no family's model depends on;
    `mpt_reference` decides whose meaning an MPT's options have (families.mpt_config), whatever the file says.
    """
    model_type = model_type_of(hf)
    family = family_of(model_type)
    if hf.get("model_type") is None:
        hf = {**hf, "model_type": model_type}
    if check_reference(mpt_reference) != AUTO and family is mpt.FAMILY:
        hf = {**hf, REFERENCE: mpt_reference}
    fields = Fields(hf, f"config.json ({model_type})")
    config = check_sizes(family.from_hf(fields), fields.where)
    if unread == "refuse" and fields.unread:
        raise ConfigError(
            f"{fields.where}: {', '.join(sorted(fields.unread))}: not an option this project knows; it accepts "
            f"{', '.join(sorted(fields.seen))}"
        )
    for line in fields.warnings() if unread == "warn" else ():
        log.warning("%s", line)
    return config


def read_config(folder: str | Path, *, mpt_reference: str = AUTO, unread: Unread = "warn") -> DecoderConfig:
    """Reads a checkpoint folder's config.json."""
    hf = read_json_object(Path(folder) / "config.json")
    return config_from_hf(hf, mpt_reference=mpt_reference, unread=unread)
