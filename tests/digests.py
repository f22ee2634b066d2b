"""What a tree computes, as digests: `python -m tests.digests [TREE] [--against TREE]`; with the second it exits with 1
where the two differ.

One server for each family and type, started from that tree, asked over gRPC: log-probabilities of every token of drawn
prompts and the likeliest beside them (forward), greedy answers, losses and gradient norms of training steps, and both
again after them. The protocol stays where modules move, so any two revisions can be compared.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import struct
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.rpc.client.client import Client
from launch.commands.server_process import Server
from tests.cluster.engine.tiny_models import CONFIGS, VOCAB, save_tiny

DTYPES = ("float32", "bfloat16")
STEPS, SEQUENCES, LENGTH = 100, 4, 24
OPTIMIZER = {"learning_rate": 1e-3, "weight_decay": 0.1, "max_grad_norm": 1.0}
SECONDS = 600.0


@dataclass(frozen=True)
class Digests:
    """Of the model as it was made, of its training, and of what that made of it."""

    forward: str
    greedy: str
    steps: str
    forward_after: str
    greedy_after: str


def digest(values: Iterable[float]) -> str:
    return hashlib.sha256(b"".join(struct.pack("<d", value) for value in values)).hexdigest()[:16]


def drawn(rng: random.Random, count: int) -> list[list[int]]:
    return [[rng.randrange(VOCAB) for _ in range(rng.randint(2, LENGTH))] for _ in range(count)]


def forward(client: Client, prompts: list[list[int]]) -> str:
    values: list[float] = []
    for result in client.score(prompts, top_logprobs=5, timeout=SECONDS).results:
        assert result.logprobs, result.status
        values += result.logprobs
        values += (value for top in result.top_logprobs for one in top.tokens for value in (one.token_id, one.logprob))
    return digest(values)


def greedy(client: Client, prompts: list[list[int]]) -> str:
    stopping = {"max_new_tokens": 40, "ignore_eos": True}
    answer = client.generate(prompts, sampling={"temperature": 0.0}, stopping=stopping, timeout=SECONDS)
    tokens = [token for result in answer.results for sample in result.samples for token in sample.token_ids]
    assert len(tokens) == 40 * len(prompts), answer
    return digest(tokens)


def trained(client: Client, rng: random.Random, steps: int) -> str:
    values: list[float] = []
    for step in range(steps):
        answer = client.train_step(drawn(rng, SEQUENCES), expected_step=step, optimizer=OPTIMIZER, timeout=SECONDS)
        values += [answer.loss, answer.grad_norm]
    return digest(values)


def computed(tree: Path, model: Path, dtype: str, tp: int, steps: int) -> Digests:
    options = ["--model", str(model), "--tp", str(tp), "--train", f"parallel.dtype={dtype}", "engine.kv_blocks=64"]
    rng = random.Random(0)
    prompts = drawn(rng, 8)
    with Server(options, timeout_s=SECONDS, tree=tree) as server, Client(server.address) as client:
        before = forward(client, prompts), greedy(client, prompts)
        return Digests(*before, trained(client, rng, steps), forward(client, prompts), greedy(client, prompts))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", nargs="?", default=".", type=Path, help="a checkout (default: this one)")
    parser.add_argument("--against", type=Path, help="another, whose digests must be the same")
    parser.add_argument("--families", default=",".join(CONFIGS), help="as in gpt2,mpt (default: all)")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--steps", type=int, default=STEPS, help="of training")
    args = parser.parse_args()
    different = 0
    for family in args.families.split(","):
        for dtype in DTYPES:
            with tempfile.TemporaryDirectory() as folder:
                model = save_tiny(family, Path(folder) / "model")
                trees = [args.tree] if args.against is None else [args.tree, args.against]
                seen = [computed(tree.resolve(), model, dtype, args.tp, args.steps) for tree in trees]
            different += len(set(seen)) - 1
            words = " ".join(f"{name} {value}" for name, value in asdict(seen[0]).items())
            verdict = "" if args.against is None else " the same" if len(set(seen)) == 1 else f" DIFFERENT: {seen[1]}"
            print(f"{family} {dtype}: {words}{verdict}", flush=True)
    return min(different, 1)


if __name__ == "__main__":
    sys.exit(main())
