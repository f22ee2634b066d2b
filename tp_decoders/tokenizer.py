"""Text to token ids and back, for checkpoints that come with a tokenizer: `load_tokenizer(folder)` is None for those
that do not.

Three kinds: tokenizer.json, and vocab.json + merges.txt, through `tokenizers`; the Japanese sub-word vocabulary
(vocab.txt + emoji.json) through transformers' own class. Decoding is done by bytes: every token stands for some, and
only whole characters become text. Nothing is trimmed or cleaned up: what a model wrote is what comes out. How ids are
streamed is in detokenizer.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from parallel.errors import CheckpointError, RequestError
from tp_decoders.hub import locate
from tp_decoders.hub_cache import TOKENIZER

END_OF_TEXT = "<|endoftext|>"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


class Vocabulary(Protocol):
    """What differs between the kinds of tokenizers."""

    size: int
    special_ids: frozenset[int]

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes a token stands for, empty for an unknown id; None where tokens mean something together only."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of all ids together, where token_bytes is None."""
        ...

    def decode_certain(self, ids: Sequence[int]) -> str:
        """The part of it that no further id can change."""
        ...

    def find(self, token: str) -> int | None: ...


class Tokenizer:
    """A checkpoint's tokenizer. `eos_token_ids` are the ids that end a text, as the checkpoint's own files say."""

    def __init__(self, vocabulary: Vocabulary, eos_token_ids: tuple[int, ...]) -> None:
        self.vocabulary = vocabulary
        self.eos_token_ids = eos_token_ids
        self.special_ids = vocabulary.special_ids
        self.vocab_size = vocabulary.size

    @property
    def eos_token_id(self) -> int | None:
        return self.eos_token_ids[0] if self.eos_token_ids else None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text. Special tokens spelled out in it are recognised, as in transformers."""
        if not isinstance(text, str):
            raise RequestError(f"only text can be tokenized, not {type(text).__name__}; give a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text has a lone surrogate at character {error.start}; give valid Unicode"
            ) from error
        return self.vocabulary.encode(text, add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of the ids; bytes that are no character become U+FFFD, ids beyond the vocabulary nothing."""
        kept = self.kept(ids, skip_special_tokens)
        pieces = [self.vocabulary.token_bytes(token_id) for token_id in kept]
        if any(piece is None for piece in pieces):
            return self.vocabulary.decode(kept)
        return b"".join(piece for piece in pieces if piece).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token."""
        piece = self.vocabulary.token_bytes(token_id)
        return self.vocabulary.decode([token_id]).encode() if piece is None else piece

    def kept(self, ids: Sequence[int], skip_special_tokens: bool) -> list[int]:
        """The ids that are to be shown."""
        wrong = next(
            (
                token_id
                for token_id in ids
                if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0
            ),
            None,
        )
        if wrong is not None:
            raise RequestError(f"{wrong!r} is no token id; give integers of at least 0")
        return [token_id for token_id in ids if not (skip_special_tokens and token_id in self.special_ids)]


class FastVocabulary:
    """A tokenizer of the `tokenizers` library; byte-level ones give bytes per token."""

    def __init__(self, tokenizer: HFTokenizer) -> None:
        tokenizer.no_truncation()  # files may carry both, and would silently shorten or fill a prompt
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        self._pieces: dict[int, bytes] = {}
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.size = max([*tokenizer.get_vocab(with_added_tokens=True).values(), -1]) + 1

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def token_bytes(self, token_id: int) -> bytes | None:
        if not self._byte_level:
            return None
        if token_id not in self._pieces:
            self._pieces[token_id] = _unmapped(self._tokenizer.id_to_token(token_id) if token_id < self.size else None)
        return self._pieces[token_id]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode([i for i in ids if i < self.size], skip_special_tokens=False))

    def decode_certain(self, ids: Sequence[int]) -> str:
        """A run of byte tokens is certain only once another token has ended it."""
        last = len(ids)
        while last and BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(ids[last - 1]) or ""):
            last -= 1
        return self.decode(ids[:last]).rstrip(REPLACEMENT)

    def find(self, token: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(token)
        return found


def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: printable bytes are themselves, the others start at U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_of_character()


def _unmapped(token: str | None) -> bytes:
    """A byte-level token's bytes; an added token outside the stand-in alphabet (a run of spaces) is literal."""
    if token is None:
        return b""
    if all(character in BYTE_OF for character in token):
        return bytes(BYTE_OF[character] for character in token)
    return token.encode()


class JapaneseVocabulary:
    """GPT-NeoX-Japanese's sub-words: <|byteN|> is a byte of a character, tags are spaces, lines and emoji."""

    TAGS: ClassVar[dict[str, str]] = {
        "<SP>": " ",
        "<BR>": "\n",
        "<TAB>": "\t",
        "<BLOCK>": "▀",
        "<KIGOU>": "ǀ",
        "<U2000U2BFF>": "‖",
    }

    def __init__(self, folder: Path) -> None:
        from transformers import GPTNeoXJapaneseTokenizer  # only this kind needs transformers, which is slow to import

        self._tokenizer = GPTNeoXJapaneseTokenizer(str(folder / "vocab.txt"), str(folder / "emoji.json"))
        self._words = self._tokenizer.ids_to_tokens
        self._emoji: dict[str, str] = self._tokenizer.emoji["emoji_inv"]
        self.special_ids = frozenset(self._tokenizer.all_special_ids)
        self.size = len(self._words)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        if token_id not in self._words:
            return b""
        word = self._words[token_id][0]
        if word.startswith("<|byte") and word.endswith("|>"):
            return bytes([int(word[6:-2])])
        return str(self.TAGS.get(word) or self._emoji.get(word) or word).encode()

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    decode_certain = decode  # never asked for: every token stands for bytes

    def find(self, token: str) -> int | None:
        return int(self._tokenizer.vocab[token]) if token in self._tokenizer.vocab else None


def load_tokenizer(path: str | Path) -> Tokenizer | None:
    """The tokenizer in a checkpoint folder or repository of the hub, None where there is none."""
    folder = locate(path, TOKENIZER)
    try:
        vocabulary = _vocabulary(folder)
    except CheckpointError:
        raise
    except Exception as error:  # the `tokenizers` library raises bare Exception for whatever is wrong with a file
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {error}; fetch it again") from error
    if vocabulary is None:
        return None
    return Tokenizer(vocabulary, eos_token_ids(folder) or _eos_by_name(folder, vocabulary))


def _vocabulary(folder: Path) -> Vocabulary | None:
    if (folder / "tokenizer.json").is_file():
        return FastVocabulary(HFTokenizer.from_file(str(folder / "tokenizer.json")))
    if (folder / "vocab.txt").is_file() and (folder / "emoji.json").is_file():
        return JapaneseVocabulary(folder)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return FastVocabulary(_byte_level_bpe(folder))
    return None


def _byte_level_bpe(folder: Path) -> HFTokenizer:
    """GPT-2's own format: the vocabulary and the merges, byte-level, with the added tokens listed beside it."""
    tokenizer = HFTokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    prefix = bool(read_json(folder / "tokenizer_config.json").get("add_prefix_space", False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    added: dict[str, int] = read_json(folder / "added_tokens.json")
    for token, expected in sorted(added.items(), key=lambda item: item[1]):
        tokenizer.add_tokens([AddedToken(token, normalized=False)])
        if tokenizer.token_to_id(token) != expected:
            raise CheckpointError(
                f"{folder / 'added_tokens.json'} gives {token!r} the id {expected}, which is not the next free one"
            )
    special = {
        token
        for name in ("special_tokens_map.json", "tokenizer_config.json")
        for token in _special_names(read_json(folder / name))
    }
    known = sorted(token for token in special | {END_OF_TEXT} if tokenizer.token_to_id(token) is not None)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in known])
    return tokenizer


def _special_names(table: dict[str, Any]) -> list[str]:
    names = [_content(table.get(key)) for key in ("bos_token", "eos_token", "unk_token", "pad_token")]
    return [name for name in [*names, *map(_content, table.get("additional_special_tokens") or [])] if name]


def _content(token: object) -> str | None:
    """Special tokens are written as text or as {"content": text, ...}."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def eos_token_ids(path: str | Path) -> tuple[int, ...]:
    """The ids that end a text, by generation_config.json or else config.json; empty where neither says."""
    for name in ("generation_config.json", "config.json"):
        value = read_json(Path(path) / name).get("eos_token_id")
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(isinstance(token_id, int) and token_id >= 0 for token_id in ids):
                raise CheckpointError(f"{Path(path) / name}: eos_token_id = {value!r} should be an id or a list of ids")
            return tuple(ids)
    return ()


def _eos_by_name(folder: Path, vocabulary: Vocabulary) -> tuple[int, ...]:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _content(read_json(folder / name).get("eos_token"))
        found = vocabulary.find(token) if token else None
        if found is not None:
            return (found,)
    return ()


def read_json(path: Path) -> dict[str, Any]:
    """An optional JSON object; empty where the file is not there."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} should hold a JSON object, not {type(value).__name__}")
    return value
