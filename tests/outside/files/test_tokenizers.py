"""Tokenizer folders with every combination of settings: the ids of 200 texts are those of transformers 4, and those of
transformers 5 but for what docs/tokenizers.md lists; what either one saves is read as it reads it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.outside.files import tokenizer_cases
from tests.outside.files.environments import ENVIRONMENTS, Environment
from tp_decoders.text.tokenizer import Tokenizer, load_tokenizer

TEXTS = tokenizer_cases.texts(tokenizer_cases.TEXTS)
NEUTRAL: dict[str, Any] = {key: values[0] for key, values in tokenizer_cases.CHOICES.items()}
NEOX = ("neox", "mpt")
STEP = 1 if os.environ.get("OUTSIDE_FILES") == "all" else 50
"""Of the combinations every 50th is tried in `make test`, all in `make outside-files`."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Many of these folders are warned of."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def ours(folder: Path) -> Tokenizer:
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    return tokenizer


def once(tokenizer: Tokenizer, text: str, ids: list[int]) -> list[int]:
    """transformers' ids, less the first token that it puts before a text which begins with that very token."""
    first = list(tokenizer.first_ids)
    begins = bool(first) and tokenizer.encode(text, add_special_tokens=False)[: len(first)] == first
    return ids[len(first) :] if begins else ids


def ask(
    environment: Environment, kind: str, choices: list[dict[str, Any]], tmp_path: Path, merges: int | None, again: bool
) -> list[Any]:
    plan = {
        "kind": kind, "choices": choices, "merges": merges, "answers": str(tmp_path / "answers"),
        "again": str(tmp_path / "again") if again else None,
    }  # fmt: skip
    environment.ask("reference_tokenizers.py", plan, tmp_path, timeout=1800)
    return [json.loads(line) for line in (tmp_path / "answers").read_text().splitlines()]


def heard_by_5(kind: str, choice: dict[str, Any]) -> dict[str, Any] | None:
    """The settings that transformers 5 hears of a folder written before it; None where it reads one more."""
    own = choice["class"] != "PreTrainedTokenizerFast"
    if kind in NEOX and own:  # with a tokenizer.json it passes over them, and its class takes the template away
        return {**choice, "add_bos_token": None, "add_eos_token": None}
    if kind == "gpt2-bpe" and choice["add_eos_token"]:
        return None
    return choice if own else {**choice, "add_prefix_space": None}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", tokenizer_cases.KINDS)
@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_ids_are_those_of_transformers_with_every_combination_of_settings(
    environment: Environment, kind: str, tmp_path: Path
) -> None:
    choices = list(tokenizer_cases.combinations(kind))[::STEP]
    answers = ask(environment, kind, choices, tmp_path, tokenizer_cases.FEW_MERGES, again=False)
    compared = 0
    for choice, wanted in zip(choices, answers, strict=True):
        heard = choice if environment.name == "transformers 4" else heard_by_5(kind, choice)
        if heard is None:
            continue
        assert isinstance(wanted, list), (choice, wanted)
        tokenizer_cases.write_folder(tmp_path / "model", kind, heard)
        compare(ours(tmp_path / "model"), wanted, choice)
        compared += 1
    assert compared > len(choices) // 3


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", tokenizer_cases.KINDS)
@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_ids_are_those_of_transformers_with_whole_vocabularies(
    environment: Environment, kind: str, tmp_path: Path
) -> None:
    count = 12 if STEP == 1 else 3
    choices = [c for c in tokenizer_cases.drawn(kind, 1, count) if heard_by_5(kind, c) == c]
    for choice, wanted in zip(choices, ask(environment, kind, choices, tmp_path, None, again=False), strict=True):
        tokenizer_cases.write_folder(tmp_path / "model", kind, choice, merges=None)
        compare(ours(tmp_path / "model"), wanted, choice)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", tokenizer_cases.KINDS)
@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_what_a_transformers_saves_is_read_as_it_reads_it(environment: Environment, kind: str, tmp_path: Path) -> None:
    choices = tokenizer_cases.drawn(kind, 2, 100 if STEP == 1 else 10)
    answers = ask(environment, kind, choices, tmp_path, tokenizer_cases.FEW_MERGES, again=True)
    for number, (choice, wanted) in enumerate(zip(choices, answers, strict=True)):
        assert isinstance(wanted, list), (choice, wanted)
        compare(ours(tmp_path / "again" / str(number)), wanted, choice)


def compare(tokenizer: Tokenizer, wanted: list[list[int]], choice: dict[str, Any]) -> None:
    for text, ids in zip(TEXTS, wanted, strict=True):
        assert tokenizer.encode(text) == once(tokenizer, text, ids), (choice, text)
