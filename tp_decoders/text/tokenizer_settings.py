"""What the files beside a tokenizer say of it: tokenizer_config.json, special_tokens_map.json, added_tokens.json.

They are merged as transformers 4.57 merges them, whose fast tokenizers most published checkpoints were used with; where
transformers 5 reads a file otherwise, docs/tokenizers.md says which of the two is followed. Nothing is built here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from tokenizers import AddedToken

from parallel.errors import CheckpointError
from tp_decoders.files.git_lfs import refuse_pointer
from tp_decoders.registry import FAMILIES, model_type_of

GPT2, NEOX, JAPANESE = "GPT2Tokenizer", "GPTNeoXTokenizer", "GPTNeoXJapaneseTokenizer"
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
END_OF_TEXT = "<|endoftext|>"
DEFAULTS = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
"""The tokens that GPT-2's and GPT-NeoX's classes have where no file says otherwise."""
EXTRA = ("additional_special_tokens", "extra_special_tokens")

Token: TypeAlias = "str | AddedToken"


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """One tokenizer's settings. `kind` is the class without "Fast", empty where no file names one."""

    kind: str
    names: Mapping[str, Token]
    """bos_token and the like, in transformers' order, then tokens with names of their own."""
    extra: tuple[Token, ...]
    added: Mapping[int, AddedToken]
    """Tokens beyond the vocabulary, by the id that their file gives them."""
    add_bos: bool
    add_eos: bool
    add_prefix_space: bool
    split_special_tokens: bool
    saved_by_5: bool
    """Whether transformers 5 wrote the files: then tokenizer.json alone says how text is cut."""

    @property
    def special(self) -> list[Token]:
        """Every special token once, the named ones first."""
        found: dict[str, Token] = {}
        for token in (*self.names.values(), *self.extra):
            found.setdefault(str(token), token)
        return list(found.values())

    def name(self, key: str) -> str | None:
        """The text of bos_token and the like."""
        return str(self.names[key]) if key in self.names else None


def read_settings(folder: Path, in_file: Mapping[int, AddedToken], otherwise: str = "") -> TokenizerSettings:
    """The settings of a folder; `in_file` are the added tokens of its tokenizer.json, `otherwise` is the kind where no
    file names one.
    """
    config = read_json(folder / "tokenizer_config.json")
    kind = tokenizer_class(folder) or otherwise
    given: dict[str, Any] = dict(DEFAULTS) if kind in (GPT2, NEOX) else {}
    given |= config
    if "added_tokens_decoder" in config:
        added = _added(folder, config["added_tokens_decoder"])
        known = {str(token): token for token in added.values()}
    else:
        _merge_special_map(folder, given)
        listed = _legacy_added(folder, given)
        added = {**listed, **in_file}
        known = {str(token): token for token in in_file.values()}
    names = {key: _token(folder, key, given[key]) for key in NAMED if given.get(key) is not None}
    extra = _extra(folder, given)
    own = given.get("extra_special_tokens")
    if isinstance(own, dict):
        names |= {key: _token(folder, key, value) for key, value in own.items()}
    return TokenizerSettings(
        kind=kind,
        names={key: known.get(str(token), token) for key, token in names.items()},
        extra=extra,
        added=added,
        add_bos=_flag(folder, config, "add_bos_token"),
        add_eos=_flag(folder, config, "add_eos_token"),
        add_prefix_space=_flag(folder, config, "add_prefix_space"),
        split_special_tokens=_flag(folder, config, "split_special_tokens"),
        saved_by_5="backend" in config or kind == "TokenizersBackend",
    )


def tokenizer_class(folder: Path) -> str:
    """The class that the files name, without "Fast", or that belongs to the model; empty where nothing tells."""
    model = read_json(folder / "config.json")
    named = read_json(folder / "tokenizer_config.json").get("tokenizer_class") or model.get("tokenizer_class")
    if named is None:
        family = FAMILIES.get(str(model_type_of(model)))
        return family.tokenizer if family else ""
    if not isinstance(named, str):
        raise CheckpointError(f"{folder}: tokenizer_class = {named!r} should be the name of a class")
    return named.removesuffix("Fast")


def _merge_special_map(folder: Path, given: dict[str, Any]) -> None:
    """special_tokens_map.json goes before tokenizer_config.json, whose additional tokens are kept."""
    for key, value in read_json(folder / "special_tokens_map.json").items():
        if isinstance(value, dict) and key not in EXTRA:
            value = {**value, "special": True}
        elif isinstance(value, list) and key in EXTRA:
            fresh = [{**token, "special": True} if isinstance(token, dict) else token for token in value]
            before = given.get(key) or []
            value = [*before, *(token for token in fresh if token not in before)]
        given[key] = value


def _legacy_added(folder: Path, given: Mapping[str, Any]) -> dict[int, AddedToken]:
    """added_tokens.json, which knows texts and ids only."""
    special = {str(_token(folder, key, given[key])) for key in NAMED if given.get(key) is not None}
    special |= set(map(str, _extra(folder, given)))
    added = {}
    for text, token_id in read_json(folder / "added_tokens.json").items():
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise CheckpointError(f"{folder / 'added_tokens.json'}: the id of {text!r} is {token_id!r}, no integer")
        added[token_id] = AddedToken(text, normalized=text not in special, special=text in special)
    return added


def _added(folder: Path, table: object) -> dict[int, AddedToken]:
    if not isinstance(table, dict) or not all(key.isascii() and key.isdigit() for key in table):
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: added_tokens_decoder should be an object of tokens by their ids"
        )
    return {int(key): _as_added(folder, f"added_tokens_decoder[{key}]", value) for key, value in table.items()}


def _extra(folder: Path, given: Mapping[str, Any]) -> tuple[Token, ...]:
    """additional_special_tokens, or as transformers 5 calls them extra_special_tokens."""
    found: list[Token] = []
    for key in EXTRA:
        tokens = given.get(key) or []
        if isinstance(tokens, dict):
            continue  # tokens by names
        if not isinstance(tokens, list):
            raise CheckpointError(f"{folder}: {key} should be a list of tokens, not {type(tokens).__name__}")
        found.extend(_token(folder, key, token) for token in tokens)
    return tuple(found)


def _token(folder: Path, key: str, value: object) -> Token:
    return value if isinstance(value, str) else _as_added(folder, key, value)


def _as_added(folder: Path, key: str, value: object) -> AddedToken:
    """A token written as an object: {"content": text, "lstrip": ..., ...}."""
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise CheckpointError(f"{folder}: {key} = {str(value)[:80]} should be a text, or an object with a content")
    flags = {
        name: value[name] for name in ("single_word", "lstrip", "rstrip", "normalized", "special") if name in value
    }
    wrong = next((name for name, flag in flags.items() if not isinstance(flag, bool)), None)
    if wrong is not None:
        raise CheckpointError(f"{folder}: {key} has {wrong} = {flags[wrong]!r}; it should be true or false")
    return AddedToken(value["content"], **flags)


def _flag(folder: Path, config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{folder / 'tokenizer_config.json'}: {key} = {value!r} should be true or false")
    return bool(value)


def read_json(path: Path) -> dict[str, Any]:
    """An optional JSON object; empty where the file is not there."""
    if not path.is_file():
        return {}
    refuse_pointer(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} should hold a JSON object, not {type(value).__name__}")
    return value
