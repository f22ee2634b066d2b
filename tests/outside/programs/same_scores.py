"""What lm-eval summed over HTTP (lm_eval_scores.py) is, bit for bit, the sum of what `Score` says over gRPC.

python -m tests.outside.programs.same_scores ADDRESS SCORES.json
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from cluster.rpc.client import AsyncClient


async def main(address: str, scores: str) -> None:
    asked = json.loads(Path(scores).read_text(encoding="utf-8"))
    async with AsyncClient(address) as client:
        contexts = [list(ids.ids) for ids in (await client.tokenize([a for a, _, _ in asked])).results]
        wholes = [list(ids.ids) for ids in (await client.tokenize([a + b for a, b, _ in asked])).results]
        told = (await client.score(wholes)).results
    wrong = [
        (value, sum(list(result.logprobs)[len(context) - 1 :]))
        for (_, _, value), context, result in zip(asked, contexts, told, strict=True)
        if value != sum(list(result.logprobs)[len(context) - 1 :])
    ]
    assert not wrong, wrong[:3]
    print(f"{len(asked)} log-likelihoods of lm-eval are those of Score over gRPC, bit for bit")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
