"""What grammars cost: compiling one, and the mask of each token, with GPT-2's vocabulary and random tokens.

python bench/guided.py [FOLDER with a tokenizer]
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path

from cluster.engine.guided.guides import Guides
from cluster.engine.request import Guide
from tp_decoders.text.token_table import token_table
from tp_decoders.text.tokenizer import load_tokenizer

HERE = Path(__file__).resolve().parents[1]
TOKENIZER = HERE / "tests" / "data" / "tokenizers" / "gpt2"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 4},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
GUIDES = {
    "JSON schema": Guide(kind="json", text=json.dumps(SCHEMA)),
    "any JSON object": Guide(kind="json_object"),
    "date": Guide(kind="regex", text=r"[12][0-9]{3}-[01][0-9]-[0-3][0-9]"),
    "free text of a bounded length": Guide(kind="regex", text="[A-Za-z ,.]{1,400}"),
}


def main(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None, f"{folder} has no tokenizer"
    size, ends = tokenizer.vocab_size, tokenizer.eos_token_ids or (tokenizer.vocab_size - 1,)
    began = time.perf_counter()
    guides = Guides(lambda: token_table(tokenizer, size, ends))
    guides.compiled(Guide(kind="choice", text='["a"]'))
    print(f"vocabulary of {size}: {time.perf_counter() - began:.2f} s, once")
    for name, guide in GUIDES.items():
        began = time.perf_counter()
        guides.compiled(guide)
        compiling = time.perf_counter() - began
        times = [seconds for seed in range(20) for seconds in _walk(guides, guide, size, ends, seed)]
        times.sort()
        mean, median, late = sum(times) / len(times), times[len(times) // 2], times[len(times) * 99 // 100]
        cost = f"mask mean {1e6 * mean:.0f}, median {1e6 * median:.0f}, 99 % {1e6 * late:.0f} us"
        print(
            f"{name}: compiled in {1e3 * compiling:.1f} ms; {cost} ({len(times)} masks of {4 * -(-size // 32)} bytes)"
        )


def _walk(guides: Guides, guide: Guide, size: int, ends: tuple[int, ...], seed: int) -> list[float]:
    """One answer of random tokens, at most 100: the seconds of each mask."""
    rng, matcher, tokens, times = random.Random(seed), guides.matcher(guide, 0), [], []
    while len(tokens) < 100:
        began = time.perf_counter()
        mask = matcher.mask(tokens)
        times.append(time.perf_counter() - began)
        token = rng.choice([i for i in range(size) if mask[i // 8] >> (i % 8) & 1])
        if token in ends:
            break
        tokens.append(token)
        if matcher.ended(tokens):
            break
    return times


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else TOKENIZER)
