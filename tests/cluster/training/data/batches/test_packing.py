"""Packing: every target is learned once an epoch, documents that fit stay whole, rows follow the stated rule."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.training.data.batches.batch import Batch
from cluster.training.data.batches.data_loader import Loader
from cluster.training.data.batches.packing import PackedDataset
from parallel.errors import ConfigError
from tests.cluster.training.data.made_corpora import EOS, random_texts, store_of

ROW = 48


def epoch(dataset: PackedDataset, batch_size: int = 3) -> list[Batch]:
    return list(Loader(dataset, batch_size=batch_size, epochs=1))


def parts(batch: Batch) -> list[tuple[list[int], list[int], list[float]]]:
    """Each document of a batch: its ids, targets and weights."""
    lengths = list(batch.lengths)
    columns = (batch.token_ids, batch.targets, batch.loss_weights)
    return list(zip(*([part.tolist() for part in column.split(lengths)] for column in columns), strict=True))


def test_every_token_but_a_documents_first_is_a_target_once_an_epoch(tmp_path: Path) -> None:
    lengths = [1, 2, ROW - 1, ROW, ROW + 1, 2 * ROW - 1, 2 * ROW, 2 * ROW + 1, 200]
    texts = [chr(97 + index) * length for index, length in enumerate(lengths)] + random_texts(100, 3 * ROW)
    batches = epoch(PackedDataset(store_of(tmp_path, texts), tokens_per_sample=ROW))
    pairs = Counter(
        (token, target)
        for batch in batches
        for ids, targets, weights in parts(batch)
        for token, target, weight in zip(ids, targets, weights, strict=True)
        if weight
    )
    ends = [[*text.encode(), EOS] for text in texts]
    assert pairs == Counter((a, b) for ids in ends for a, b in pairwise(ids))


def test_a_document_that_fits_is_whole_and_its_last_token_predicts_nothing(tmp_path: Path) -> None:
    texts = random_texts(80, ROW - 3)
    batches = epoch(PackedDataset(store_of(tmp_path, texts), tokens_per_sample=ROW))
    found = [part for batch in batches for part in parts(batch)]
    assert sorted(bytes(ids[:-1]).decode() for ids, _, _ in found) == sorted(texts)
    for ids, targets, weights in found:
        assert ids[-1] == EOS and targets == [*ids[1:], -100]
        assert weights == [1.0] * (len(ids) - 1) + [0.0]


def test_a_long_document_is_cut_at_rows_and_each_piece_predicts_the_next_ones_first_token(tmp_path: Path) -> None:
    text = "".join(random_texts(60, 9))[: 2 * ROW + 5]
    dataset = PackedDataset(store_of(tmp_path, [text]), tokens_per_sample=ROW, shuffle=False)
    ids = [*text.encode(), EOS]
    found = [part for batch in epoch(dataset) for part in parts(batch)]
    assert [len(part[0]) for part in found] == [ROW, ROW, 6]
    assert found[0][:2] == (ids[:ROW], ids[1 : ROW + 1])
    assert found[2][:2] == (ids[2 * ROW :], [*ids[2 * ROW + 1 :], -100])


def test_a_last_token_that_would_be_alone_is_a_target_only(tmp_path: Path) -> None:
    dataset = PackedDataset(store_of(tmp_path, ["a" * 2 * ROW, "b"]), tokens_per_sample=ROW, shuffle=False)
    found = [part for batch in epoch(dataset) for part in parts(batch)]
    assert [len(part[0]) for part in found] == [ROW, ROW, 2]
    assert found[1][1] == [*b"a" * (ROW - 1), EOS] and found[1][2] == [1.0] * ROW


def test_rows_are_full_but_never_padded_and_positions_restart(tmp_path: Path) -> None:
    dataset = PackedDataset(store_of(tmp_path, random_texts(300, 2 * ROW)), tokens_per_sample=ROW)
    for batch in epoch(dataset):
        assert sum(batch.lengths) == len(batch.token_ids) == len(batch.targets) == len(batch.positions)
        assert batch.positions.tolist() == [position for length in batch.lengths for position in range(length)]
        for sample in batch.split(1):
            assert 1 <= sum(sample.lengths) <= ROW


def naive_rows(dataset: PackedDataset) -> list[list[int]]:
    """The rule of the module's docstring, one piece at a time: the lengths in each row of epoch 0."""
    rows: list[list[int]] = []
    for length in dataset.pieces(0, 0, dataset.num_pieces).lengths.tolist():
        if rows and sum(rows[-1]) + length <= dataset.tokens_per_sample:
            rows[-1].append(length)
        else:
            rows.append([length])
    return rows


@pytest.mark.parametrize("batch_size", [1, 2, 7, 1000])
@pytest.mark.parametrize("longest", [3, 40, 200])
def test_rows_take_pieces_in_order_while_they_fit(tmp_path: Path, longest: int, batch_size: int) -> None:
    dataset = PackedDataset(store_of(tmp_path, random_texts(300, longest)), tokens_per_sample=ROW, seed=5)
    rows = [list(sample.lengths) for batch in epoch(dataset, batch_size) for sample in batch.split(1)]
    assert rows == naive_rows(dataset)


def test_each_epoch_has_its_own_order_and_all_documents(tmp_path: Path) -> None:
    texts = random_texts(100, 30)
    dataset = PackedDataset(store_of(tmp_path, texts), tokens_per_sample=ROW, seed=3)
    starts = [dataset.pieces(number, 0, dataset.num_pieces).starts.tolist() for number in range(3)]
    assert starts[0] != starts[1] != starts[2] != starts[0]
    assert sorted(starts[0]) == sorted(starts[1]) == sorted(starts[2])
    unshuffled = PackedDataset(dataset.store, tokens_per_sample=ROW, shuffle=False)
    assert unshuffled.pieces(4, 0, 100).starts.tolist() == sorted(starts[0])


def test_nothing_is_learned_of_a_prompt(tmp_path: Path) -> None:
    prompts, texts = ["what is 1+1? ", "", "p" * (ROW + 10), "q" * 200], ["two", "no prompt", "late", "later"]
    dataset = PackedDataset(store_of(tmp_path, texts, prompts), tokens_per_sample=ROW)
    learned: Counter[int] = Counter()
    for batch in epoch(dataset):
        kept = batch.loss_weights > 0
        assert int(kept.sum()) == batch.global_weight
        assert all(bool(weights.any()) for weights in batch.loss_weights.split(list(batch.lengths)))
        learned.update(batch.targets[kept].tolist())
    # the first byte of "no prompt" has nothing before it
    assert learned == Counter([*b"two", EOS, *b"o prompt", EOS, *b"late", EOS, *b"later", EOS])


def test_a_batch_is_cut_into_micro_batches_at_samples(tmp_path: Path) -> None:
    dataset = PackedDataset(store_of(tmp_path, random_texts(300, 30)), tokens_per_sample=ROW)
    batch = next(Loader(dataset, batch_size=7))
    micro = batch.split(3)
    assert [part.num_samples for part in micro] == [3, 3, 1]
    assert [part.first_sample for part in micro] == [0, 3, 6]
    for name in ("token_ids", "targets", "positions", "loss_weights"):
        assert torch.equal(torch.cat([getattr(part, name) for part in micro]), getattr(batch, name))
    assert sum((part.lengths for part in micro), ()) == batch.lengths
    with pytest.raises(ConfigError, match="micro-batch of 0 samples"):
        batch.split(0)


def test_what_cannot_be_packed_is_refused(tmp_path: Path) -> None:
    store = store_of(tmp_path, ["a"])
    with pytest.raises(ConfigError, match="tokens_per_sample 1 leaves nothing to predict"):
        PackedDataset(store, tokens_per_sample=1)
    with pytest.raises(ConfigError, match="part 'test' of the data is unknown"):
        PackedDataset(store, tokens_per_sample=8, part="test")


def test_types_are_those_of_the_forward(tmp_path: Path) -> None:
    batch = next(Loader(PackedDataset(store_of(tmp_path, ["abc"]), tokens_per_sample=8), batch_size=1))
    assert [batch.token_ids.dtype, batch.targets.dtype, batch.positions.dtype] == [torch.int64] * 3
    assert batch.loss_weights.dtype == torch.float32 and isinstance(batch.global_weight, int)
    assert np.shares_memory(batch.samples(0, 1).token_ids.numpy(), batch.token_ids.numpy())
