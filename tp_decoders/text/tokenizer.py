"""Text to token ids and back, for checkpoints that come with a tokenizer: `load_tokenizer(folder)` is None for those
that do not.

Three kinds: tokenizer.json, and vocab.json + merges.txt, through `tokenizers` (fast_tokenizer.py); the Japanese
sub-word vocabulary (vocab.txt + emoji.json). Decoding is done by bytes: every token stands for some, and only whole
characters become text. Nothing is trimmed or cleaned up: what a model wrote is what comes out. How ids are streamed is
in detokenizer.py.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from tokenizers import Encoding, decoders
from tokenizers import Tokenizer as HFTokenizer

from parallel.errors import CheckpointError, RequestError, TpError
from tp_decoders.files.companion_files import tokenizer_files
from tp_decoders.files.git_lfs import refuse_pointer
from tp_decoders.hub.repository import locate
from tp_decoders.hub.snapshot_cache import TOKENIZER
from tp_decoders.text.fast_tokenizer import open_tokenizer
from tp_decoders.text.japanese_tokenizer import FILES as JAPANESE_FILES
from tp_decoders.text.japanese_tokenizer import JapaneseVocabulary
from tp_decoders.text.tokenizer_settings import JAPANESE, read_json, tokenizer_class

log = logging.getLogger(__name__)
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
LONG_CHARACTERS = 4096
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
UNREAD = ("tokenizer.model", "spiece.model", "tiktoken.model", "vocab.txt")


class Vocabulary(Protocol):
    """What differs between the kinds of tokenizers."""

    size: int
    special_tokens: Mapping[int, str]
    """The tokens that are not shown as text, by their ids."""
    first_ids: tuple[int, ...]
    """What is put before every text."""

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
        self.special_tokens = vocabulary.special_tokens
        self.special_ids = frozenset(vocabulary.special_tokens)
        self.first_ids = vocabulary.first_ids
        self.vocab_size = vocabulary.size

    @property
    def eos_token_id(self) -> int | None:
        return self.eos_token_ids[0] if self.eos_token_ids else None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text. Special tokens spelled out in it are recognised, as in transformers.

        `add_special_tokens` False: of a fragment, without what the tokenizer puts before and after every text. A text
        that begins with these very tokens does not get them twice.
        """
        if not isinstance(text, str):
            raise RequestError(f"only text can be tokenized, not {type(text).__name__}; give a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text has a lone surrogate at character {error.start}; give valid Unicode"
            ) from error
        with _of_the_library(RequestError, "the tokenizer cannot read this text", "give another, or token ids"):
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
        self._tokenizer = tokenizer
        self._byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        added = tokenizer.get_added_tokens_decoder()
        # an added token is text as it stands, also where its characters could be stand-ins for bytes (é, Ġ)
        self._pieces = {token_id: token.content.encode() for token_id, token in added.items()}
        self.special_tokens: Mapping[int, str] = {
            token_id: token.content for token_id, token in added.items() if token.special
        }
        self.first_ids = _before_every_text(tokenizer)
        self.size = max([*tokenizer.get_vocab(with_added_tokens=True).values(), -1]) + 1

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        encoding = self._encoding(text, add_special_tokens)
        ids, count = list(encoding.ids), len(self.first_ids)
        if count and add_special_tokens and tuple(ids[count : 2 * count]) == self.first_ids:
            return ids[count:] if _leading(encoding.special_tokens_mask) == count else ids
        return ids

    def _encoding(self, text: str, add_special_tokens: bool) -> Encoding:
        """Of a long text as a batch: `encode` holds the interpreter all the while, three seconds of a million
        characters, and a batch does not."""
        if len(text) < LONG_CHARACTERS:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding

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


def _before_every_text(tokenizer: HFTokenizer) -> tuple[int, ...]:
    if tokenizer.num_special_tokens_to_add(False) == 0:
        return ()
    probe = tokenizer.encode("a")
    return tuple(probe.ids[: _leading(probe.special_tokens_mask)])


def _leading(mask: Sequence[int]) -> int:
    """How many tokens at the start are not of the text itself."""
    return next((i for i, added in enumerate(mask) if not added), len(mask))


def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: printable bytes are themselves, the others start at U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_of_character()


def _unmapped(token: str | None) -> bytes:
    """The bytes of a token of the byte-level vocabulary; one outside the stand-in alphabet is literal."""
    if token is None:
        return b""
    if all(character in BYTE_OF for character in token):
        return bytes(BYTE_OF[character] for character in token)
    return token.encode()


@contextmanager
def _of_the_library(kind: type[TpError], what: str, do: str) -> Iterator[None]:
    """The `tokenizers` library raises bare Exception, and panics, for whatever is wrong with a file."""
    try:
        yield
    except TpError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise kind(f"{what}: {reason}; {do}") from error


def load_tokenizer(path: str | Path) -> Tokenizer | None:
    """The tokenizer in a checkpoint folder or repository of the hub, None where there is none."""
    folder = locate(path, TOKENIZER)
    for file in tokenizer_files(folder).values():
        refuse_pointer(file)
    with _of_the_library(CheckpointError, f"the tokenizer in {folder} cannot be read", "fetch it again"):
        found = _vocabulary(folder)
    if found is None:
        _warn_of_other_kinds(folder)
        return None
    vocabulary, eos_token = found
    named = vocabulary.find(eos_token) if eos_token else None
    return Tokenizer(vocabulary, eos_token_ids(folder) or (() if named is None else (named,)))


def _vocabulary(folder: Path) -> tuple[Vocabulary, str | None] | None:
    """What reads and writes text, and the token that ends one by its own files."""
    japanese = all((folder / name).is_file() for name in JAPANESE_FILES)
    if japanese and (tokenizer_class(folder) == JAPANESE or not (folder / "tokenizer.json").is_file()):
        vocabulary = JapaneseVocabulary(folder)
        return vocabulary, vocabulary.eos_token
    opened = open_tokenizer(folder)
    return None if opened is None else (FastVocabulary(opened[0]), opened[1].name("eos_token"))


def _warn_of_other_kinds(folder: Path) -> None:
    found = next((name for name in UNREAD if (folder / name).is_file()), None)
    if found is not None:
        log.warning(
            "%s has a tokenizer in a form that is not read here (%s), so text cannot be used: save it with "
            "transformers as tokenizer.json", folder, found,
        )  # fmt: skip


def eos_token_ids(path: str | Path) -> tuple[int, ...]:
    """The ids that end a text, by generation_config.json or else config.json; empty where neither says."""
    for name in ("generation_config.json", "config.json"):
        value = read_json(Path(path) / name).get("eos_token_id")
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(type(token_id) is int for token_id in ids):
                raise CheckpointError(f"{Path(path) / name}: eos_token_id = {value!r} should be an id or a list of ids")
            return tuple(dict.fromkeys(ids))
    return ()


def default_new_tokens(path: str | Path) -> int | None:
    """How many tokens an answer has where nobody says, by generation_config.json; None: it does not say either."""
    value = read_json(Path(path) / "generation_config.json").get("max_new_tokens")
    if value is not None and not (type(value) is int and value > 0):
        log.warning("%s: max_new_tokens = %r is not a number above 0; it is ignored", path, value)
        return None
    return value


def check_vocabulary(tokenizer: Tokenizer | None, vocab_size: int, where: object) -> None:
    """Warns of a tokenizer with ids that the model does not have; a text that needs them is refused when it comes."""
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        log.warning(
            "the tokenizer in %s has %d tokens, more than the model's vocabulary of %d: a text with one of the others "
            "is refused", where, tokenizer.vocab_size, vocab_size,
        )  # fmt: skip
