"""Each family learns real text and answers over gRPC: Shakespeare, and Soseki for the Japanese one.

    python bench/families.py [--families gpt2 mpt] [--out FOLDER]

For each family the training preset configs/training/laptop*.yaml (tensor-parallel over two CPU ranks, random weights,
the family's own tokenizer; GPT-BigCode with GPT-2's) is trained by `tp-decoders train`, its last checkpoint served by
`tp-decoders serve` and asked to go on with a text. The loss, as the mean of the last 20 steps, must be below 60 %
of the first step's; beside it stands the loss on text that was held out. Prints a table; status 1 where a family fails.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from cluster.rpc.client.client import AsyncClient
from launch.commands.smoke import Trained, served, train_preset

PRESETS = {
    "gpt2": ("laptop", "ROMEO:\n"),
    "gpt_neox": ("laptop-gpt-neox", "ROMEO:\n"),
    "gpt_neox_japanese": ("laptop-gpt-neox-japanese", "おれは"),
    "mpt": ("laptop-mpt", "ROMEO:\n"),
    "gpt_bigcode": ("laptop-gpt-bigcode", "ROMEO:\n"),
    "llama": ("laptop-llama", "ROMEO:\n"),
}
LIMIT = 0.6


async def ask(address: str, prompt: str) -> str:
    """What the server makes of a prompt."""
    async with AsyncClient(address) as client:
        answer = await client.generate(
            [prompt], sampling={"temperature": 0.8, "top_k": 40, "seed": 7},
            stopping={"max_new_tokens": 32, "ignore_eos": True},
        )  # fmt: skip
    result = answer.results[0]
    if not result.samples or len(result.samples[0].token_ids) != 32:
        raise SystemExit(f"the server did not answer {prompt!r}: {result.status.message}")
    return str(result.samples[0].text)


def row(family: str, trained: Trained) -> str:
    verdict = "ok" if trained.share < LIMIT else "ABOVE 60 %"
    return (
        f"| {family} | {trained.first:.2f} | {trained.last:.2f} | {trained.share:.1%} | {trained.held_out:.2f} | "
        f"{trained.steps} | {trained.tokens} | {trained.train_seconds:.0f} | {trained.seconds:.0f} | {verdict} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=list(PRESETS), default=list(PRESETS))
    parser.add_argument("--out", type=Path, help="where the runs are kept (default: a new temporary folder)")
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp(prefix="tp-decoders-families-"))
    rows, answers = [], []
    for family in args.families:
        preset, prompt = PRESETS[family]
        trained = train_preset(preset, out.resolve() / family)
        with served(trained.checkpoint) as server:
            text = asyncio.run(ask(server.address, prompt))
        rows.append(row(family, trained))
        answers.append(f"{family}: {' '.join((prompt + '|' + text).split())}")
        print(answers[-1], flush=True)
    print("| family | first loss | last 20 steps | of the first | held out | steps | tokens | s training | s all | |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join([*rows, "", *answers]))
    return 0 if all(" ok |" in line for line in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
