"""Stop anywhere, resume on any number of ranks: the samples are those of an undisturbed run."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from cluster.training.data.batches.batch import Batch
from cluster.training.data.batches.data_loader import Loader
from cluster.training.data.batches.data_state import DataState
from cluster.training.data.batches.eval_split import SplitRule
from cluster.training.data.batches.packing import PackedDataset
from cluster.training.data.corpus.document import DataError
from cluster.training.data.store.token_store import TokenStore
from parallel.errors import ConfigError
from tests.cluster.training.data.made_corpora import random_texts, store_of

BATCH, STEPS = 5, 40  # about three epochs


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return store_of(tmp_path_factory.mktemp("store"), random_texts(100, 60))


def dataset_of(store: TokenStore, tokens_per_sample: int = 64, seed: int = 1) -> PackedDataset:
    return PackedDataset(store, tokens_per_sample=tokens_per_sample, seed=seed)


Sample = tuple[int, tuple[int, ...], list[int], list[int], list[int], list[float]]


def samples(batch: Batch) -> list[Sample]:
    """A batch as plain values, sample by sample, each with its number."""
    columns = ("token_ids", "targets", "positions", "loss_weights")
    return [
        (part.first_sample, part.lengths, *(getattr(part, name).tolist() for name in columns))
        for part in batch.split(1)
    ]  # type: ignore[misc]


@pytest.fixture(scope="module")
def undisturbed(store: TokenStore) -> list[list[Sample]]:
    loader = Loader(dataset_of(store), batch_size=BATCH)
    found = [samples(batch) for batch in islice(loader, STEPS)]
    assert loader.state.epoch >= 2
    return found


@pytest.mark.parametrize("dp_size", [1, 2, 3, 4, 5])
def test_the_ranks_shares_in_order_are_the_batch_of_one_rank(
    store: TokenStore, undisturbed: list[list[Sample]], dp_size: int
) -> None:
    loaders = [Loader(dataset_of(store), batch_size=BATCH, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
    for expected in undisturbed:
        shares = [next(loader) for loader in loaders]
        assert [sample for share in shares for sample in samples(share)] == expected
        assert max(s.num_samples for s in shares) - min(s.num_samples for s in shares) <= 1
        assert len({(s.global_samples, s.global_tokens, s.global_weight) for s in shares}) == 1
        assert shares[0].global_samples == BATCH
        assert shares[0].global_tokens == sum(s.num_tokens for s in shares)
        assert shares[0].global_weight == sum(float(s.loss_weights.sum()) for s in shares)
    assert len({json.dumps(loader.state.to_json()) for loader in loaders}) == 1


@pytest.mark.parametrize("seed", range(6))
def test_stopped_at_random_and_resumed_on_other_dp_sizes_the_batches_are_the_same(
    store: TokenStore, undisturbed: list[list[Sample]], seed: int
) -> None:
    rng = random.Random(seed)
    found: list[list[Sample]] = []
    saved: str | None = None
    while len(found) < STEPS:
        dp_size, steps = rng.randint(1, 4), rng.randint(0, 9)
        dataset = dataset_of(TokenStore.open(store.folder))  # a new process opens everything anew
        state = DataState.from_json(json.loads(saved)) if saved else None
        loaders = [Loader(dataset, state, batch_size=BATCH, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
        for _ in range(steps):
            found.append([sample for loader in loaders for sample in samples(next(loader))])
        saved = json.dumps(loaders[rng.randrange(dp_size)].state.to_json())
    assert found[:STEPS] == undisturbed


def test_samples_are_numbered_on_whatever_the_batch_size(store: TokenStore, undisturbed: list[list[Sample]]) -> None:
    expected = [sample for batch in undisturbed for sample in batch]
    assert [sample[0] for sample in expected] == list(range(STEPS * BATCH))
    found: list[Sample] = []
    state = None
    for batch_size in (1, 9, 2, 30):
        loader = Loader(dataset_of(store), state, batch_size=batch_size)
        found += [sample for batch in islice(loader, 4) for sample in samples(batch)]
        state = loader.state
    assert found == expected[: len(found)]


def test_skipping_is_reading_without_looking(store: TokenStore, undisturbed: list[list[Sample]]) -> None:
    loader = Loader(dataset_of(store), batch_size=BATCH, dp_rank=0, dp_size=1)
    loader.skip(17)
    assert samples(next(loader)) == undisturbed[17]
    assert loader.state.batches == 18 and loader.state.sample == 18 * BATCH


def test_one_epoch_ends_with_what_is_left_even_if_a_rank_gets_none(store: TokenStore) -> None:
    dataset = dataset_of(store)
    num_rows = len(dataset.rows(0, 0, 10_000))
    dp_size = 3
    batch_size = next(size for size in range(3, num_rows) if num_rows % size == 1)
    loaders = [Loader(dataset, batch_size=batch_size, dp_rank=r, dp_size=dp_size, epochs=1) for r in range(dp_size)]
    batches = [list(loader) for loader in loaders]
    assert {len(found) for found in batches} == {num_rows // batch_size + 1}
    assert [found[-1].num_samples for found in batches] == [0, 0, 1]
    empty = batches[0][-1]
    assert empty.num_tokens == 0 and empty.lengths == () and empty.split(2) == [] and empty.global_samples == 1
    assert empty.token_ids.dtype == torch.int64 and empty.loss_weights.dtype == torch.float32
    assert sum(batch.num_samples for found in batches for batch in found) == num_rows
    assert next(loaders[0], None) is None and loaders[0].state.sample == num_rows


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"shift": 1}, "its tokens are another tokenizer's .tokenizer was"),
        ({"texts": 101}, "files were added, removed or changed. .corpus was"),
        ({"tokens_per_sample": 32}, "its rows are of another length .tokens_per_sample was 64, is 32"),
        ({"seed": 2}, "its seed differs .seed was 1, is 2"),
        ({"split": SplitRule(eval_fraction=0.1)}, "its split differs"),
    ],
)
def test_a_place_in_other_data_is_refused(store: TokenStore, tmp_path: Path, other: dict, message: str) -> None:
    saved = DataState.start(dataset_of(store)).to_json()
    if "shift" in other or "texts" in other:
        store = store_of(tmp_path, random_texts(other.get("texts", 100), 60), shift=other.get("shift", 0))
    options = {"tokens_per_sample": 64, "seed": 1} | {k: v for k, v in other.items() if k not in ("shift", "texts")}
    with pytest.raises(DataError, match=message):
        Loader(PackedDataset(store, **options), DataState.from_json(json.loads(json.dumps(saved))), batch_size=BATCH)


def test_a_saved_place_that_is_damaged_is_refused(store: TokenStore) -> None:
    dataset = dataset_of(store)
    good = DataState.start(dataset).to_json()
    damaged: tuple[object, ...] = (
        None,
        [],
        {},
        good | {"more": 1},
        good | {"position": -1},
        good | {"epoch": 1.5},
        good | {"identity": 3},
    )
    for bad in damaged:
        with pytest.raises(DataError, match="saved position in the data"):
            DataState.from_json(bad)
    with pytest.raises(DataError, match="beyond the"):
        Loader(dataset, replace(DataState.start(dataset), position=10_000), batch_size=BATCH)


def test_ranks_and_batches_that_cannot_be_are_refused(store: TokenStore) -> None:
    with pytest.raises(ConfigError, match="dp_rank 2 is outside 2"):
        Loader(dataset_of(store), batch_size=BATCH, dp_rank=2, dp_size=2)
    with pytest.raises(ConfigError, match="batch_size 2 is less than the 3"):
        Loader(dataset_of(store), batch_size=2, dp_size=3)
