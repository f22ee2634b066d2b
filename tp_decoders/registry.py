"""The families this project knows: one import and one entry each. A new family is its file, a line here and a row of
the parity test.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from parallel.errors import ConfigError
from tp_decoders.families import gpt2, gpt_bigcode, gpt_neox, gpt_neox_japanese, llama, mpt
from tp_decoders.families.family import AUTO, Family
from tp_decoders.files.json_fields import Fields, shown
from tp_decoders.files.json_files import read_json_object
from tp_decoders.model.config import DecoderConfig, check_sizes

log = logging.getLogger(__name__)

UnknownKeys = Literal["warn", "refuse", "ignore"]
"""Of the keys of a config that nobody asked for: one warning names them, they are errors, or nothing is said."""

FAMILIES: dict[str, Family] = {
    model_type: family
    for family in (
        gpt2.FAMILY, gpt_neox.FAMILY, gpt_neox_japanese.FAMILY, mpt.FAMILY, gpt_bigcode.FAMILY, llama.FAMILY
    )
    for model_type in family.types
}  # fmt: skip
CLASS = re.compile(r"(?P<family>[A-Za-z0-9]+?)(LMHead|DoubleHeads)?(Model|For[A-Z]\w*)")


def family_of(model_type: object) -> Family:
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(
            f"model_type {shown(model_type)} is not one of this project's families: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]


def model_type_of(hf: Mapping[str, Any]) -> Any:
    """What config.json gives as model_type; where it gives none, as GPT-2's first files did, what its class tells."""
    named = hf.get("architectures")
    if hf.get("model_type") is not None or not isinstance(named, list) or not named:
        return hf.get("model_type")
    match = CLASS.fullmatch(str(named[0]))
    begins = match["family"].casefold() if match else None  # who made MPT's format writes it in capitals
    return next((name for name, family in FAMILIES.items() if family.types[name].casefold() == begins), None)


def config_from_hf(hf: Mapping[str, Any], *, unread: UnknownKeys = "warn", **choices: str) -> DecoderConfig:
    """Reads the contents of a config.json. `unread`: what becomes of keys that no family's model depends on;
    `choices` are options that the caller decides whatever the file says, where the family has them (`Family.choices`).
    """
    model_type = model_type_of(hf)
    family = family_of(model_type)
    _check_choices(choices)
    decided = {key: value for key, value in choices.items() if key in family.choices and value != AUTO}
    hf = {**hf, "model_type": model_type, **decided}
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


def _check_choices(choices: Mapping[str, str]) -> None:
    known = {key: accepted for family in FAMILIES.values() for key, accepted in family.choices.items()}
    for key, value in choices.items():
        if key not in known:
            raise ConfigError(f"{key} is no choice of any family; there is {', '.join(known)}")
        if value not in known[key]:
            raise ConfigError(f"{key} is {shown(value)}; choose one of {', '.join(known[key])}")


def read_config(folder: str | Path, *, unread: UnknownKeys = "warn", **choices: str) -> DecoderConfig:
    """Reads a checkpoint folder's config.json."""
    hf = read_json_object(Path(folder) / "config.json")
    return config_from_hf(hf, unread=unread, **choices)
