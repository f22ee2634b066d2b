"""The files beside a tokenizer decide as in transformers, whatever people write into them; a few of the folders that
`make outside-files` tries, and what is decided otherwise on purpose.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer as HFTokenizer

from launch.commands.convert import tokenizer_files as tokenizer_to_convert
from parallel.errors import CheckpointError, RequestError
from tests.outside.files import tokenizer_cases
from tp_decoders import build, initialise, load, save
from tp_decoders.registry import config_from_hf
from tp_decoders.text.detokenizer import IncrementalDetokenizer
from tp_decoders.text.tokenizer import Tokenizer, check_vocabulary, load_tokenizer

TEXTS = tokenizer_cases.texts(tokenizer_cases.TEXTS)
END = tokenizer_cases.END
NEUTRAL: dict[str, Any] = {key: values[0] for key, values in tokenizer_cases.CHOICES.items()}
PLAIN = tokenizer_cases.PLAIN


def opened(folder: Path) -> Tokenizer:
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    return tokenizer


def made(folder: Path, kind: str, config: dict[str, Any] | None = None, **choice: Any) -> Tokenizer:
    """A small vocabulary of the kind; `config` is added to its tokenizer_config.json."""
    tokenizer_cases.write_folder(folder, kind, {**NEUTRAL, **choice})
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    return opened(folder)


def streamed(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> str:
    stream = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    return "".join(stream.push([token_id]) for token_id in ids) + stream.flush()


def assert_as_transformers(folder: Path) -> None:
    tokenizer, reference = opened(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert tokenizer.encode(text) == once(tokenizer, text, reference(text)["input_ids"]), text


def once(tokenizer: Tokenizer, text: str, ids: list[int]) -> list[int]:
    """transformers' ids, less the first token that it puts before a text which begins with that very token."""
    first = list(tokenizer.first_ids)
    begins = bool(first) and tokenizer.encode(text, add_special_tokens=False)[: len(first)] == first
    return ids[len(first) :] if begins else ids


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", tokenizer_cases.KINDS)
def test_ids_equal_transformers_for_drawn_settings(kind: str, seed: int, tmp_path: Path) -> None:
    (choice,) = tokenizer_cases.drawn(kind, seed, 1)
    tokenizer_cases.write_folder(tmp_path / "model", kind, choice)
    assert_as_transformers(tmp_path / "model")


@pytest.mark.parametrize("kind", ["gpt2-bpe", "neox"])
def test_ids_equal_transformers_with_whole_vocabularies(kind: str, tmp_path: Path) -> None:
    choice = {**NEUTRAL, "class": "own", "add_bos_token": True, "add_prefix_space": True, "named": "other"}
    tokenizer_cases.write_folder(tmp_path / "model", kind, {**choice, "added": "decoder"}, merges=None)
    assert_as_transformers(tmp_path / "model")


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "neox", "gpt2-bpe"])
def test_the_map_goes_before_the_settings_unless_these_list_the_added_tokens(
    kind: str, decoder: bool, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<|im_start|>"], "add_bos_token": True,
        "unk_token": END,
    }  # fmt: skip
    if decoder:
        settings["added_tokens_decoder"] = {"700": {"content": "größe", **PLAIN}}
    if kind != "neox":
        del settings["add_bos_token"]
    said = {
        "bos_token": {**PLAIN, "content": "<|pad|>", "lstrip": True}, "eos_token": "<|im_end|>",
        "additional_special_tokens": ["<fim_pad>", "<|im_start|>"],
    }  # fmt: skip
    made(tmp_path / "model", kind, settings)
    (tmp_path / "model" / "special_tokens_map.json").write_text(json.dumps(said))
    assert_as_transformers(tmp_path / "model")
    tokenizer = opened(tmp_path / "model")
    assert tokenizer.special_tokens[tokenizer.eos_token_ids[0]] == ("</s>" if decoder else "<|im_end|>")


JAPANESE = "https://a.b/c さんに a@b.jp へ 03-1234-5678 を 2020年1月2日(月) 令和2年1月2日 1,000円(税込) ▀▀━━ 慶應"


@pytest.mark.parametrize("settings", [None, {"do_clean_text": True, "eos_token": "<|x|>"}])
def test_japanese_texts_are_cleaned_where_the_settings_say_so(settings: dict[str, Any] | None, tmp_path: Path) -> None:
    folder = shutil.copytree(tokenizer_cases.DATA / "gpt-neox-japanese", tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt_neox_japanese"}))
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer, reference = opened(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in [*TEXTS, JAPANESE]:
        assert tokenizer.encode(text) == reference(text)["input_ids"], text
    cleaned = "<URL> さんに <EMAIL> へ <TEL> を <DATE> 令和2年<DATE> <PRICE> ▀ 慶応"
    ids = tokenizer.encode(JAPANESE)
    assert tokenizer.decode(ids) == streamed(tokenizer, ids) == reference.decode(ids)
    assert (tokenizer.decode(ids) == cleaned) == bool(settings)
    assert tokenizer.eos_token_id == reference.eos_token_id


# ------------------------------------------------------------------------------------------------ decided otherwise


def test_a_text_that_begins_with_the_first_token_does_not_get_it_twice(tmp_path: Path) -> None:
    tokenizer = made(tmp_path / "neox", "neox", add_bos_token=True, add_eos_token=True)
    (end,) = tokenizer.first_ids
    hello = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode("hello") == tokenizer.encode(f"{END}hello") == [end, *hello, end]
    assert tokenizer.encode(f"{END}{END}hello") == [end, end, *hello, end], "what the text itself repeats stays"
    assert tokenizer.encode(END) == tokenizer.encode("") == [end, end]
    from_file = made(tmp_path / "gpt2", "gpt2", template=True)
    assert from_file.encode(f"{END}a")[:2] == from_file.encode("a"), "also where tokenizer.json has the template"


def test_a_fragment_gets_nothing_before_or_after_it(tmp_path: Path) -> None:
    tokenizer = made(tmp_path / "neox", "neox", add_bos_token=True, add_eos_token=True)
    assert tokenizer.encode("", add_special_tokens=False) == []
    assert tokenizer.encode(END, add_special_tokens=False) == list(tokenizer.first_ids)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("word", ["größe", "đem", "člověk", "Ġa", "é", "a b", "猫", "\u0120\u0120", "e\u0301"])
def test_added_tokens_come_out_as_they_are_written(word: str, special: bool, tmp_path: Path) -> None:
    added = {"700": {"content": END, **PLAIN}, "701": {"content": word, **PLAIN, "special": special}}
    tokenizer = made(tmp_path / "gpt2", "gpt2", {"added_tokens_decoder": added})
    text = f"a {word} b{word}"
    ids = tokenizer.encode(text)
    token_id = tokenizer.vocabulary.find(word)
    assert token_id is not None
    assert ids.count(token_id) == 2
    assert tokenizer.decode(ids, False) == streamed(tokenizer, ids, False) == text
    assert tokenizer.token_bytes(token_id) == word.encode()
    shown = text.replace(word, "") if special else text
    assert tokenizer.decode(ids) == streamed(tokenizer, ids) == shown


@pytest.mark.parametrize("kind", ["gpt2", "neox", "gpt2-bpe"])
def test_nothing_is_cleaned_up_in_what_a_model_wrote(kind: str, tmp_path: Path) -> None:
    tokenizer = made(tmp_path / "model", kind, {"clean_up_tokenization_spaces": True})
    text = "Well , I 'm here . don 't ?"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_files_of_transformers_5_are_read_as_it_reads_them(tmp_path: Path) -> None:
    config = {
        "backend": "tokenizers", "tokenizer_class": "TokenizersBackend", "is_local": True, "eos_token": "<|im_end|>",
        "bos_token": END, "extra_special_tokens": ["<|im_start|>", "<|im_end|>"], "add_prefix_space": True,
    }  # fmt: skip
    tokenizer = made(tmp_path / "model", "gpt2", config)
    start, end = tokenizer.encode("<|im_start|><|im_end|>")
    assert {start, end} <= tokenizer.special_ids
    assert tokenizer.eos_token_ids == (end,)
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello", "tokenizer.json alone says how text is cut"


def test_ids_beyond_the_tokenizer_are_no_text(tmp_path: Path) -> None:
    """A vocabulary is often padded: Pythia's has 50304 rows for 50277 tokens."""
    for kind in ("gpt2", "neox", "bigcode"):
        tokenizer = made(tmp_path / kind, kind)
        beyond = [tokenizer.vocab_size, tokenizer.vocab_size + 26, 2**31]
        ids = [*tokenizer.encode("a"), *beyond, *tokenizer.encode("é")]
        assert tokenizer.decode(ids) == streamed(tokenizer, ids) == streamed(tokenizer, ids, False) == "aé"
        assert [tokenizer.token_bytes(token_id) for token_id in beyond] == [b""] * 3


def test_a_tokenizer_with_more_tokens_than_the_model_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = made(tmp_path / "model", "gpt2")
    check_vocabulary(tokenizer, tokenizer.vocab_size, "here")
    assert not caplog.records
    check_vocabulary(tokenizer, tokenizer.vocab_size - 1, "here")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "more than the model's vocabulary" in caplog.text


def test_ids_that_a_file_gives_and_transformers_does_not_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer_cases.write_folder(tmp_path / "model", "gpt2-bpe", NEUTRAL)
    (tmp_path / "model/added_tokens.json").write_text(json.dumps({"<|x|>": 5000}))
    opened(tmp_path / "model")
    assert "'<|x|>' should be 5000" in caplog.text
    assert_as_transformers(tmp_path / "model")


# ----------------------------------------------------------------------------------------------------- broken files

TINY: dict[str, Any] = {
    "version": "1.0", "added_tokens": [],
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
}  # fmt: skip
BROKEN: dict[str, dict[str, Any]] = {
    "half a file": {"tokenizer.json": '{"model": '},
    "a list": {"tokenizer.json": "[]"},
    "bytes": {"tokenizer.json": "\0" * 100},
    "nested too deeply": {"tokenizer.json": TINY, "tokenizer_config.json": '{"a":' * 100_000},
    "merges of nothing": {"tokenizer.json": {**TINY, "model": {**TINY["model"], "merges": ["a zz"]}}},
    "merges of numbers": {"tokenizer.json": {**TINY, "model": {**TINY["model"], "merges": [1, 2]}}},
    "negative ids": {"tokenizer.json": {**TINY, "model": {**TINY["model"], "vocab": {"a": -1}}}},
    "settings in a list": {"tokenizer.json": TINY, "tokenizer_config.json": []},
    "map in a list": {"tokenizer.json": TINY, "special_tokens_map.json": []},
    "added by a word": {"tokenizer.json": TINY, "added_tokens.json": {"x": "y"}},
    "token in a list": {"tokenizer.json": TINY, "tokenizer_config.json": {"bos_token": ["<s>"]}},
    "added in a list": {"tokenizer.json": TINY, "tokenizer_config.json": {"added_tokens_decoder": [1]}},
    "added without an id": {"tokenizer.json": TINY, "tokenizer_config.json": {"added_tokens_decoder": {"x": {}}}},
    "added as text": {"tokenizer.json": TINY, "tokenizer_config.json": {"added_tokens_decoder": {"5": "x"}}},
    "flag as text": {"tokenizer.json": TINY, "tokenizer_config.json": {"pad_token": {"content": "x", "lstrip": "y"}}},
    "switch as text": {"tokenizer.json": TINY, "tokenizer_config.json": {"add_bos_token": "yes"}},
    "class as number": {"tokenizer.json": TINY, "tokenizer_config.json": {"tokenizer_class": 5}},
    "special as text": {"tokenizer.json": TINY, "tokenizer_config.json": {"additional_special_tokens": "<x>"}},
    "half a character": {"tokenizer.json": TINY, "tokenizer_config.json": {"bos_token": "\ud800"}},
    "vocabulary in a list": {"vocab.json": [1], "merges.txt": "#version\n"},
    "merge of one": {"vocab.json": {"a": 0}, "merges.txt": "#version\na\n"},
    "no emoji": {"vocab.txt": "a\nb,c\n", "emoji.json": {}},
}  # fmt: skip


def write_files(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize("files", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_one_line(files: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(write_files(tmp_path, files))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


UNIGRAM = {
    **TINY, "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0], ["▁h", -1], ["é", -3], ["a", -2]]},
    "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
}  # fmt: skip
WORDPIECE = {
    **TINY, "pre_tokenizer": {"type": "BertPreTokenizer"},
    "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
              "max_input_chars_per_word": 100, "vocab": {"hello": 0, "##s": 1}},
    "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": False},
}  # fmt: skip


@pytest.mark.parametrize(("pipeline", "text"), [(UNIGRAM, "hé"), (WORDPIECE, "hellos hello")], ids=["unigram", "words"])
def test_other_kinds_of_vocabularies_work(pipeline: dict[str, Any], text: str, tmp_path: Path) -> None:
    tokenizer = opened(write_files(tmp_path, {"tokenizer.json": pipeline}))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == streamed(tokenizer, ids) == text


def test_a_text_that_a_vocabulary_cannot_hold_is_refused(tmp_path: Path) -> None:
    tokenizer = opened(write_files(tmp_path, {"tokenizer.json": WORDPIECE}))
    with pytest.raises(RequestError, match="cannot read this text"):
        tokenizer.encode("xyz")


def test_a_pattern_that_the_library_gives_up_on_refuses_the_text_alone(tmp_path: Path) -> None:
    """The library panics there, which is no Exception."""
    split = {"type": "Split", "pattern": {"Regex": "^(a+)+$"}, "behavior": "Isolated", "invert": False}
    tokenizer = opened(write_files(tmp_path, {"tokenizer.json": {**TINY, "pre_tokenizer": split}}))
    with pytest.raises(RequestError, match="cannot read this text"):
        tokenizer.encode("a" * 40 + "b")
    assert tokenizer.encode("ab") == [2]


def test_a_form_that_is_not_read_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "spiece.model").write_bytes(b"\0")
    assert load_tokenizer(tmp_path) is None
    assert "spiece.model" in caplog.text


# -------------------------------------------------------------------------------------------------- kept with weights

SIDE = {
    "tokenizer_config.json": {"chat_template": "{{ messages }}"}, "special_tokens_map.json": {"bos_token": END},
    "added_tokens.json": {}, "chat_template.jinja": "{{ messages }}", "chat_template.json": {"chat_template": "x"},
    "generation_config.json": {"eos_token_id": [5, 7]}, "additional_chat_templates/tools.jinja": "{{ tools }}",
}  # fmt: skip


def with_weights(folder: Path) -> Path:
    hf = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 700, "n_positions": 16}
    save(initialise(build(config_from_hf(hf)), 0), folder)
    made(folder.parent / "tokenizer", "gpt2")
    shutil.copy(folder.parent / "tokenizer/tokenizer.json", folder)
    (folder / "additional_chat_templates").mkdir()
    return write_files(folder, SIDE)


def by_save(source: Path, target: Path) -> None:
    save(load(source), target)


def by_convert(source: Path, target: Path) -> None:
    from launch.main import main

    assert main(["convert", str(source), str(target)]) == 0


@pytest.mark.parametrize("way", [by_save, by_convert])
def test_all_that_belongs_to_a_tokenizer_goes_where_the_weights_go(
    way: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    source = with_weights(tmp_path / "source")
    way(source, tmp_path / "target")
    for name in ("tokenizer.json", *SIDE):
        assert (tmp_path / "target" / name).read_bytes() == (source / name).read_bytes(), name


def test_settings_alone_are_no_tokenizer(tmp_path: Path) -> None:
    write_files(tmp_path, {"tokenizer_config.json": {}, "chat_template.jinja": "x"})
    with pytest.raises(Exception, match=r"holds none of \['tokenizer.json', 'vocab.json', 'vocab.txt'\]"):
        tokenizer_to_convert(str(tmp_path))


def test_the_library_itself_would_misread_an_added_token(tmp_path: Path) -> None:
    """Why added tokens are not decoded by the library: its byte alphabet holds their letters."""
    made(tmp_path / "gpt2", "gpt2", {"added_tokens_decoder": {"700": {"content": "größe", **PLAIN, "special": False}}})
    library = HFTokenizer.from_file(str(tmp_path / "gpt2/tokenizer.json"))
    library.add_tokens(["größe"])
    assert "größe" not in library.decode(library.encode("größe").ids)
