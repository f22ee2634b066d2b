"""Writes the folders beside it with Hugging Face's `datasets`: splits that `save_to_disk` wrote, and CSV.

Run once with datasets 5.2.0 (`python make_dataset.py`), from an environment of its own; no test runs it.
"""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, DatasetDict  # type: ignore

HERE = Path(__file__).resolve().parent


def rows(start: int, stop: int) -> dict[str, list[str] | list[int]]:
    """Texts with what CSV must put in quotes."""
    texts = [f'text {number}, "quoted"\nand 二 lines' for number in range(start, stop)]
    return {"id": list(range(start, stop)), "prompt": [f"{number}?" for number in range(start, stop)], "text": texts}


if __name__ == "__main__":
    train, test = Dataset.from_dict(rows(0, 5)), Dataset.from_dict(rows(5, 7))
    DatasetDict(train=train, test=test).save_to_disk(HERE / "saved", num_shards={"train": 2, "test": 1})
    train.to_csv(HERE / "train.csv")
    train.shuffle(seed=1).save_to_disk(HERE / "shuffled")
