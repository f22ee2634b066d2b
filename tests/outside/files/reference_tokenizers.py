"""Ids of tokenizer folders by the transformers of this interpreter. Run by environments.py with a plan:

    {"kind": ..., "choices": [...], "merges": ..., "answers": FILE, "again": FOLDER or null}

For each choice of tokenizer_cases.py (the one file of this project that it imports: it draws the folders) a line of
JSON with the ids of the texts; `again`: of what this transformers saves of the tokenizer, left in FOLDER.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))
from tests.outside.files import tokenizer_cases


def main(plan: dict[str, Any]) -> None:
    texts = tokenizer_cases.texts(tokenizer_cases.TEXTS)
    with Path(plan["answers"]).open("w") as answers:
        for number, choice in enumerate(plan["choices"]):
            with tempfile.TemporaryDirectory() as folder:
                tokenizer_cases.write_folder(Path(folder), plan["kind"], choice, plan["merges"])
                again = None if plan["again"] is None else Path(plan["again"]) / str(number)
                answers.write(json.dumps(found(Path(folder), again, texts)) + "\n")


def found(folder: Path, again: Path | None, texts: list[str]) -> Any:
    """The ids, or the error in one line."""
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        if again is not None:
            tokenizer.save_pretrained(again)
            shutil.copy(folder / "config.json", again)
            tokenizer = transformers.AutoTokenizer.from_pretrained(again)
        return tokenizer(texts)["input_ids"]
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]


if __name__ == "__main__":
    logging.disable(logging.ERROR)
    main(json.loads(Path(sys.argv[1]).read_text()))
