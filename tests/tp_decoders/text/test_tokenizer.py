"""Tokenizers against reference vectors and transformers, and streams that never show half a character."""

from __future__ import annotations

import json
import random
import shutil
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models
from transformers import GPTNeoXJapaneseTokenizer

from parallel.errors import CheckpointError, RequestError
from tp_decoders.text.detokenizer import IncrementalDetokenizer
from tp_decoders.text.tokenizer import FastVocabulary, Tokenizer, eos_token_ids, load_tokenizer

DATA = Path(__file__).parents[2] / "data"
KINDS = ("gpt2", "gpt2-bpe", "gpt-neox-20b", "gpt-neox-japanese", "byte-fallback")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    bpe = tmp_path_factory.mktemp("gpt2-bpe")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(DATA / "tokenizers/gpt2" / name, bpe)
    folders = {kind: DATA / "tokenizers" / kind for kind in ("gpt2", "gpt-neox-20b", "gpt-neox-japanese")} | {
        "gpt2-bpe": bpe
    }
    found = {kind: load_tokenizer(folder) for kind, folder in folders.items()}
    assert all(found.values())
    return {"byte-fallback": Tokenizer(byte_fallback_vocabulary(), ()), **found}  # type: ignore[dict-item]


def byte_fallback_vocabulary() -> FastVocabulary:
    """A small sentence-piece-like tokenizer: words, and bytes as <0xNN> tokens."""
    words = ["▁the", "▁cat", "ter", "▁", "猫", "s"]
    vocab = {token: i for i, token in enumerate([f"<0x{byte:02X}>" for byte in range(256)] + words)}
    tokenizer = HFTokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    return FastVocabulary(tokenizer)


def vectors(name: str) -> list[tuple[str, list[int]]]:
    with (DATA / f"tokenizer-vectors/ggml-vocab-{name}.gguf.inp").open(newline="", encoding="utf-8") as texts:
        inputs = texts.read().split("\n__ggml_vocab_test__\n")
    outputs = (DATA / f"tokenizer-vectors/ggml-vocab-{name}.gguf.out").read_text().splitlines()
    ids = [[int(token) for token in line.split()] for line in outputs]
    return list(zip(inputs, ids, strict=False))


@pytest.mark.parametrize(("name", "kind"), [("gpt-2", "gpt2"), ("gpt-2", "gpt2-bpe"), ("mpt", "gpt-neox-20b")])
def test_encoding_equals_the_reference_vectors(tokenizers: dict[str, Tokenizer], name: str, kind: str) -> None:
    pairs = vectors(name)
    assert len(pairs) >= 46
    for text, ids in pairs:
        assert tokenizers[kind].encode(text, add_special_tokens=False) == ids, text


@pytest.mark.parametrize(("name", "kind"), [("gpt-2", "gpt2"), ("gpt-2", "gpt2-bpe"), ("mpt", "gpt-neox-20b")])
def test_decoding_restores_the_text(tokenizers: dict[str, Tokenizer], name: str, kind: str) -> None:
    for text, ids in vectors(name):
        if kind != "gpt-neox-20b" or text.isascii():  # that tokenizer normalises Unicode (NFC) when it encodes
            assert tokenizers[kind].decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
def test_stream_of_random_ids_adds_up_to_the_whole(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer, dice = tokenizers[kind], random.Random(kind)
    for trial in range(60):
        ids = random_ids(tokenizer, dice, 400 if trial < 3 else 40)
        skip = bool(trial % 2)
        stream = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
        pieces, rest = [], list(ids)
        while rest:
            count = dice.choice((1, 1, 1, 3))
            pieces.append(stream.push(rest[:count]))
            rest = rest[count:]
        assert "".join([*pieces, stream.flush()]) == tokenizer.decode(ids, skip_special_tokens=skip)


def random_ids(tokenizer: Tokenizer, dice: random.Random, count: int) -> list[int]:
    """Ids of any kind, half of them tokens of less than one character where there are such."""
    partial = partial_ids(tokenizer)
    return [
        dice.choice(partial) if dice.random() < 0.5 else dice.randrange(tokenizer.vocab_size + 3) for _ in range(count)
    ]


@cache
def partial_ids(tokenizer: Tokenizer) -> list[int]:
    ids = range(tokenizer.vocab_size)
    return [i for i in ids if "\N{REPLACEMENT CHARACTER}" in tokenizer.decode([i], skip_special_tokens=False)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["猫と😀 naïve — cafe\u0301", "日本語の文章。\n二行目👩‍👩‍👧"])
def test_stream_never_shows_half_a_character(tokenizers: dict[str, Tokenizer], kind: str, text: str) -> None:
    tokenizer = tokenizers[kind]
    ids = byte_ids(text) if kind == "byte-fallback" else tokenizer.encode(text)
    stream = IncrementalDetokenizer(tokenizer)
    pieces = [stream.push([token_id]) for token_id in ids]
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)
    assert any(pieces[:-1]), "text comes while the stream goes on"


def byte_ids(text: str) -> list[int]:
    """Every other character as bytes, with a word between."""
    return [token for i, character in enumerate(text) for token in (*character.encode(), 256 + i % 2)]


def test_byte_level_decoding_equals_the_tokenizers_library(tokenizers: dict[str, Tokenizer]) -> None:
    for kind in ("gpt2", "gpt-neox-20b"):
        library = HFTokenizer.from_file(str(DATA / "tokenizers" / kind / "tokenizer.json"))
        dice = random.Random(kind)
        for _ in range(300):
            ids = random_ids(tokenizers[kind], dice, 30)
            assert tokenizers[kind].decode(ids, skip_special_tokens=False) == library.decode(
                ids, skip_special_tokens=False
            )


def test_japanese_ids_equal_transformers_and_bytes_become_characters(tokenizers: dict[str, Tokenizer]) -> None:
    japanese = tokenizers["gpt-neox-japanese"]
    text = "吾輩は猫である🐯。実は慶応(慶應)大学出身"
    folder = DATA / "tokenizers/gpt-neox-japanese"
    reference = GPTNeoXJapaneseTokenizer(str(folder / "vocab.txt"), str(folder / "emoji.json"))
    ids = japanese.encode(text)
    assert ids == reference(text)["input_ids"]
    assert japanese.decode(ids) == reference.decode(ids) == text.replace("慶應", "慶応")
    rare = "丂とꙮ\n"  # not in the vocabulary: bytes, which transformers would decode one by one to U+FFFD
    assert japanese.decode(japanese.encode(rare)) == rare
    assert len(japanese.encode(rare)) > len(rare)
    assert (japanese.vocab_size, japanese.special_ids) == (32000, frozenset({31996, 31999}))


def test_special_tokens_are_known_and_skipped_on_request(tokenizers: dict[str, Tokenizer]) -> None:
    for kind in ("gpt2", "gpt2-bpe"):
        tokenizer = tokenizers[kind]
        assert tokenizer.encode("a<|endoftext|>") == [64, 50256]
        assert (tokenizer.vocab_size, tokenizer.special_ids) == (50257, frozenset({50256}))
        assert (tokenizer.decode([64, 50256]), tokenizer.decode([64, 50256], False)) == ("a", "a<|endoftext|>")


def test_what_is_not_text_or_an_id_is_refused(tokenizers: dict[str, Tokenizer]) -> None:
    with pytest.raises(RequestError, match="bytes"):
        tokenizers["gpt2"].encode(b"abc")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="surrogate at character 2"):
        tokenizers["gpt2"].encode("ab\ud800")
    for wrong in (-1, "5", 1.5, True):
        with pytest.raises(RequestError, match="token id"):
            tokenizers["gpt2"].decode([wrong])  # type: ignore[list-item]
    assert tokenizers["gpt2"].decode([64, 50999]) == "a"  # embeddings are often padded beyond the tokenizer


def test_folder_without_a_tokenizer_gives_none(tmp_path: Path) -> None:
    assert load_tokenizer(DATA / "gpt-nano-sort") is None
    assert load_tokenizer(tmp_path) is None


def test_broken_tokenizer_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(CheckpointError, match=r"tokenizer in .* cannot be read"):
        load_tokenizer(tmp_path)


def test_eos_ids_come_from_the_generation_config_first(tmp_path: Path) -> None:
    assert eos_token_ids(DATA / "gpt-nano-sort") == ()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert eos_token_ids(tmp_path) == (7,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    assert eos_token_ids(tmp_path) == (1, 2)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": "x"}))
    with pytest.raises(CheckpointError, match="eos_token_id = 'x'"):
        eos_token_ids(tmp_path)


def test_eos_falls_back_to_the_tokenizers_own_name(tmp_path: Path) -> None:
    shutil.copy(DATA / "tokenizers/gpt2/tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.eos_token_id == 50256


def test_prompts_are_never_truncated_by_a_tokenizer_file(tmp_path: Path) -> None:
    library = HFTokenizer.from_file(str(DATA / "tokenizers/gpt2/tokenizer.json"))
    library.enable_truncation(3)
    library.enable_padding(length=9)
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert len(tokenizer.encode("one two three four five")) == 5
