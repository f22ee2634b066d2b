"""A folder's tokenizer of the `tokenizers` library, as transformers makes it: the pipeline of tokenizer.json, or
GPT-2's own vocab.json and merges.txt; then the tokens and settings that the files beside it add.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tp_decoders.text.tokenizer_settings import GPT2, NEOX, TokenizerSettings, read_settings

log = logging.getLogger(__name__)
FILE = "tokenizer.json"
BPE_FILES = ("vocab.json", "merges.txt")


def open_tokenizer(folder: Path) -> tuple[Tokenizer, TokenizerSettings] | None:
    """None where the folder has neither form."""
    if (folder / FILE).is_file():
        tokenizer = Tokenizer.from_file(str(folder / FILE))
        settings = read_settings(folder, tokenizer.get_added_tokens_decoder())
    elif all((folder / name).is_file() for name in BPE_FILES):
        settings = read_settings(folder, {}, GPT2)
        tokenizer = _byte_level_bpe(folder, settings)
    else:
        return None
    tokenizer.no_truncation()  # files may carry both, and would silently shorten or fill a prompt
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = settings.split_special_tokens
    _add_tokens(folder, tokenizer, settings)
    if settings.kind in (GPT2, NEOX) or not settings.saved_by_5:
        _set_prefix_space(tokenizer, settings.add_prefix_space)
    if settings.kind == NEOX:  # its class sets both, whatever tokenizer.json says
        _set_template(tokenizer, settings, settings.add_bos, settings.add_eos)
    elif settings.kind == GPT2 and settings.add_bos and not (folder / FILE).is_file():
        _set_template(tokenizer, settings, True, False)
    return tokenizer, settings


def _byte_level_bpe(folder: Path, settings: TokenizerSettings) -> Tokenizer:
    """The vocabulary and the merges, byte-level."""
    tokenizer = Tokenizer(models.BPE.from_file(*(str(folder / name) for name in BPE_FILES)))
    if settings.kind == NEOX:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=settings.add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _add_tokens(folder: Path, tokenizer: Tokenizer, settings: TokenizerSettings) -> None:
    """In transformers' order, which decides the ids: tokens by their ids, then special ones that are not there yet."""
    there = tokenizer.get_added_tokens_decoder()
    same = {repr(token) for token in there.values()}
    fresh: list[str | AddedToken] = [t for _, t in sorted(settings.added.items()) if repr(t) not in same]
    texts = {token.content for token in there.values()} | set(map(str, fresh))
    fresh += [t for t in settings.special if isinstance(t, AddedToken) or t not in texts]
    special = set(map(str, settings.special))
    tokenizer.add_tokens([_marked(token, special) for token in fresh])
    _warn_of_other_ids(folder, tokenizer, settings.added)


def _marked(token: str | AddedToken, special: set[str]) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=token in special)
    token.special = token.special or token.content in special
    return token


def _warn_of_other_ids(folder: Path, tokenizer: Tokenizer, added: Mapping[int, AddedToken]) -> None:
    wrong = [(i, token.content) for i, token in added.items() if tokenizer.token_to_id(token.content) != i]
    if wrong:
        token_id, text = wrong[0]
        log.warning(
            "%s: %d added tokens get other ids than their file says, as in transformers: %r should be %d and is %s",
            folder, len(wrong), text, token_id, tokenizer.token_to_id(text),
        )  # fmt: skip


def _set_prefix_space(tokenizer: Tokenizer, add_prefix_space: bool) -> None:
    """Where the pre-tokenizer is of a kind that can put a space before a text."""
    if tokenizer.pre_tokenizer is None:
        return
    state = json.loads(tokenizer.pre_tokenizer.__getstate__())
    if state.get("add_prefix_space", add_prefix_space) != add_prefix_space:
        made = getattr(pre_tokenizers, state.pop("type"))
        tokenizer.pre_tokenizer = made(**state | {"add_prefix_space": add_prefix_space})


def _set_template(tokenizer: Tokenizer, settings: TokenizerSettings, bos: bool, eos: bool) -> None:
    """The tokens before and after every text."""
    wanted = [(alias, key) for alias, key, on in (("BOS", "bos_token", bos), ("EOS", "eos_token", eos)) if on]
    ids = {alias: tokenizer.token_to_id(settings.name(key) or "") for alias, key in wanted}
    for alias, key in wanted:
        if ids[alias] is None:
            log.warning("the tokenizer's files ask for %s with every text and name none; none is added", key)
    known = [(alias, token_id) for alias, token_id in ids.items() if token_id is not None]
    pieces = [*(f"{alias}:0" for alias, _ in known if alias == "BOS"), "$A:0"]
    pieces += [f"{alias}:0" for alias, _ in known if alias == "EOS"]
    tokenizer.post_processor = processors.TemplateProcessing(single=pieces, special_tokens=known)
