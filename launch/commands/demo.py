"""`tp-decoders demo`: what this project does, in a few minutes on two CPU ranks.

A small trained checkpoint (minGPT's gpt-nano, which sorts six letters) is served over Ray and gRPC and asked to sort,
one by one and all 729 inputs in one call. Then a small GPT-2 is trained on Shakespeare from random weights, and the
checkpoint it leaves is served and asked to go on. Needs the repository's tests/data.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from cluster.rpc.client.client import AsyncClient
from launch.commands.smoke import ROOT, served, train_preset
from parallel.errors import ConfigError, TpError

SORTER = ROOT / "tests" / "data" / "gpt-nano-sort"
TEXT = ROOT / "tests" / "data" / "text" / "tinyshakespeare.txt"
PRESET = "laptop"
SETTINGS = ("steps=160", "schedule.total_steps=160")
LETTERS = "ABC"
GREEDY = {"temperature": 0.0}
EXAMPLES = ("CBABAC", "BACCAB", "CCCBBA")
OPENINGS = ("ROMEO:\n", "To be, or not to be")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None: it is the same for everyone."""


def run(args: argparse.Namespace) -> int:
    for needed in (SORTER, TEXT):
        if not needed.exists():
            raise ConfigError(f"{needed} is missing: the demonstration runs from a checkout of the repository")
    began = time.monotonic()
    print("1. A trained model that sorts six letters (3 layers, 3 heads, so two ranks own 2 and 1).\n")
    with served(SORTER) as server:
        asyncio.run(_sort(server.address))
    folder = Path(tempfile.mkdtemp(prefix="tp-decoders-demo-"))
    print("\n2. A small GPT-2 learns Shakespeare from random weights, on two ranks: a minute or two.\n", flush=True)
    trained = train_preset(PRESET, folder / "run", SETTINGS)
    print(
        f"\n  {trained.steps} steps, {trained.tokens} tokens: loss {trained.first:.2f} -> {trained.last:.2f} "
        f"({trained.share:.0%} of it); on text it has not seen {trained.held_out:.2f}"
    )
    print("\n3. The checkpoint it left, served as it is.\n")
    with served(trained.checkpoint) as server:
        asyncio.run(_continue(server.address))
    print(f"\nThe run and its loss plot are kept: {trained.plot or trained.checkpoint.parent}")
    print(f"Everything stopped in order. {time.monotonic() - began:.0f} s in all.")
    return 0


async def _sort(address: str) -> None:
    async with AsyncClient(address) as client:
        info = await client.model_info()
        print(
            f"  {info.family} at {address}, {info.dtype}, {info.numerics}, cache of {info.kv_capacity_tokens} tokens\n"
        )
        for letters in EXAMPLES:
            print(f"  {letters} -> ", end="")
            async for chunk in client.stream([to_ids(letters)], sampling=GREEDY, stopping={"max_new_tokens": 6}):
                print(to_letters(chunk.token_ids), end="", flush=True)
            print()
        await _sort_all(client)


async def _sort_all(client: AsyncClient) -> None:
    inputs = list(itertools.product(range(len(LETTERS)), repeat=6))
    began = time.monotonic()
    answer = await client.generate(inputs, sampling=GREEDY, stopping={"max_new_tokens": 6})
    seconds = time.monotonic() - began
    wrong = []
    for given, result in zip(inputs, answer.results, strict=True):
        got = list(result.samples[0].token_ids) if result.samples else result.status.message
        if got != sorted(given):
            wrong.append(f"{to_letters(given)} -> {got}")
    print(f"\n  all {len(inputs)} inputs in one call: {len(inputs) - len(wrong)} sorted, {seconds:.2f} s")
    if wrong:
        raise TpError(f"{len(wrong)} inputs came back unsorted, the first: {wrong[0]}")


async def _continue(address: str) -> None:
    async with AsyncClient(address) as client:
        for opening in OPENINGS:
            print(f"\n  {opening}", end="")
            sampling = {"temperature": 0.8, "top_k": 40, "seed": 7}
            stopping = {"max_new_tokens": 48, "ignore_eos": True}
            async for chunk in client.stream([opening], sampling=sampling, stopping=stopping):
                print(chunk.text.replace("\n", "\n  "), end="", flush=True)
            print()


def to_ids(letters: str) -> list[int]:
    return [LETTERS.index(letter) for letter in letters]


def to_letters(ids: Sequence[int]) -> str:
    return "".join(LETTERS[token] for token in ids)
