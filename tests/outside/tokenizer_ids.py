"""The ids that the transformers of this interpreter gives for tokenizer_cases.py, one JSON line per folder:

    python tests/outside/tokenizer_ids.py KIND SEED COUNT [MERGES]     COUNT folders of a kind drawn with a seed; 0: all

Needs nothing of this project but the file beside it, so that it runs under any version.
"""

from __future__ import annotations

import json
import logging
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.outside import tokenizer_cases

TEXTS = 200


def chosen(kind: str, seed: int, count: int) -> list[dict[str, Any]]:
    """The combinations to try: all where count is 0."""
    every = list(tokenizer_cases.combinations(kind))
    return every if count == 0 else random.Random(f"{kind} {seed}").sample(every, count)


def main(kind: str, seed: str, count: str, merges: str = str(tokenizer_cases.FEW_MERGES)) -> None:
    import transformers

    logging.disable(logging.ERROR)
    texts = tokenizer_cases.texts(TEXTS)
    for choice in chosen(kind, int(seed), int(count)):
        with tempfile.TemporaryDirectory() as folder:
            tokenizer_cases.write_folder(Path(folder), kind, choice, int(merges) or None)
            try:
                tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
                found: Any = [tokenizer(text)["input_ids"] for text in texts]
            except Exception as error:
                found = f"{type(error).__name__}: {error}"[:200]
        print(json.dumps({"case": tokenizer_cases.name_of(choice), "ids": found}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
