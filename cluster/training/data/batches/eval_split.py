"""Train or eval: decided for each document by 64 bits of its own text and the seed, and by nothing else.

Adding, removing or reordering files moves no other document to the other side; exact duplicates are always on the same
side; another tokenizer splits the same. For a corpus of one or few long documents, `unit="piece"` decides for each
piece of a document (a piece is at most one row long) by the document's hash and the piece's number; then parts of one
document are on both sides.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.training.data.batches.permutation import key_words, mix64
from parallel.errors import ConfigError

PARTS = ("train", "eval")
UNITS = ("document", "piece")


@dataclass(frozen=True, kw_only=True)
class SplitRule:
    """The share of documents (or pieces) that is held out for evaluation, about `eval_fraction`, chosen by `seed`."""

    eval_fraction: float = 0.0  # held out
    seed: int = 0  # of the choice
    unit: str = "document"  # document or piece

    def __post_init__(self) -> None:
        if not 0.0 <= self.eval_fraction < 1.0:
            raise ConfigError(
                f"eval_fraction {self.eval_fraction} is not in [0, 1); give the share to hold out, such as 0.05"
            )
        if self.unit not in UNITS:
            raise ConfigError(f"unit {self.unit!r} is unknown; choose one of {list(UNITS)}")

    def in_eval(self, hashes: NDArray[np.uint64], pieces: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which pieces are held out, given their documents' hashes and their numbers in the document."""
        drawn = mix64(hashes ^ key_words("split", self.seed, count=1)[0])
        if self.unit == "piece":
            drawn = mix64(drawn + pieces)
        return drawn < np.uint64(int(self.eval_fraction * 2.0**64))

    def to_json(self) -> dict[str, float | int | str]:
        return asdict(self)
