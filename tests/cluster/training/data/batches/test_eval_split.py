"""What is held out for evaluation depends on each document's own text and the seed only."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.training.data.batches.data_loader import Loader
from cluster.training.data.batches.eval_split import SplitRule
from cluster.training.data.batches.packing import PackedDataset
from cluster.training.data.corpus.document import DataError
from cluster.training.data.store.token_store import TokenStore
from parallel.errors import ConfigError
from tests.cluster.training.data.made_corpora import EOS, random_texts, store_of

TEXTS = random_texts(600, 20)
RULE = SplitRule(eval_fraction=0.2, seed=1)


def documents(store: TokenStore, part: str, split: SplitRule = RULE, tokens_per_sample: int = 64) -> list[bytes]:
    """The texts of one part, without their ends."""
    dataset = PackedDataset(store, tokens_per_sample=tokens_per_sample, split=split, part=part)
    found = []
    for batch in Loader(dataset, batch_size=8, epochs=1):
        for ids in batch.token_ids.split(list(batch.lengths)):
            found.append(bytes(token for token in ids.tolist() if token != EOS))
    return found


def test_train_and_eval_part_the_corpus(tmp_path: Path) -> None:
    store = store_of(tmp_path, TEXTS)
    train, held_out = documents(store, "train"), documents(store, "eval")
    assert sorted(train + held_out) == sorted(text.encode() for text in TEXTS)
    assert 0.14 < len(held_out) / len(TEXTS) < 0.26


def test_adding_and_reordering_documents_moves_no_other(tmp_path: Path) -> None:
    before = set(documents(store_of(tmp_path / "a", TEXTS), "eval"))
    more = [*random_texts(300, 30, seed=9)[100:], *reversed(TEXTS)]
    after = set(documents(store_of(tmp_path / "b", more), "eval"))
    assert {text for text in after if text.decode() in set(TEXTS)} == before


def test_duplicates_are_on_one_side(tmp_path: Path) -> None:
    store = store_of(tmp_path, TEXTS[:200] * 2)
    train, held_out = documents(store, "train"), documents(store, "eval")
    assert held_out and not set(train) & set(held_out)


def test_another_tokenizer_splits_the_same_and_another_seed_does_not(tmp_path: Path) -> None:
    store = store_of(tmp_path / "a", TEXTS)
    shifted = documents(store_of(tmp_path / "b", TEXTS, shift=1), "eval")
    unshifted = {bytes((byte - 1) % 256 for byte in text) for text in shifted}
    assert unshifted == set(documents(store, "eval"))
    assert unshifted != set(documents(store, "eval", SplitRule(eval_fraction=0.2, seed=2)))


def test_one_long_document_is_split_by_pieces_when_asked(tmp_path: Path) -> None:
    text = "".join(random_texts(600, 20))
    store = store_of(tmp_path, [text])
    with pytest.raises(DataError, match="none of its 1 documents is in the '(train|eval)' part"):
        for part in ("train", "eval"):
            documents(store, part)
    by_piece = SplitRule(eval_fraction=0.2, seed=1, unit="piece")
    train, held_out = documents(store, "train", by_piece, 32), documents(store, "eval", by_piece, 32)
    assert 0.1 < len(held_out) / (len(train) + len(held_out)) < 0.3
    assert sum(map(len, train + held_out)) == len(text)


def test_nothing_is_held_out_unless_asked(tmp_path: Path) -> None:
    store = store_of(tmp_path, TEXTS[:20])
    assert len(documents(store, "train", SplitRule())) == 20
    with pytest.raises(DataError, match=r"'eval' part at corpus\.split\.eval_fraction=0"):
        documents(store, "eval", SplitRule())


@pytest.mark.parametrize(("options", "field"), [({"eval_fraction": 1.0}, "eval_fraction"), ({"unit": "line"}, "unit")])
def test_a_rule_that_cannot_be_is_refused(options: dict, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        SplitRule(**options)
