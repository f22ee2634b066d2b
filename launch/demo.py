"""`tp-decoders demo`: what this project does, in under a minute on two CPU ranks.

A small trained checkpoint (minGPT's gpt-nano, which sorts six letters) is served over Ray and gRPC and asked to sort,
one by one and all 729 inputs in one call; then a tiny GPT-2 with the real GPT-2 tokenizer but random weights streams
text. Needs the repository's tests/data. Trains nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from cluster.rpc.client import AsyncClient
from launch.background import Server
from launch.init import copy_tokenizer, write_random
from launch.presets import find, read
from parallel.errors import ConfigError, TpError

ROOT = Path(__file__).resolve().parents[1]
SORTER = ROOT / "tests" / "data" / "gpt-nano-sort"
TOKENIZER = ROOT / "tests" / "data" / "tokenizers" / "gpt2"
LETTERS = "ABC"
GREEDY = {"temperature": 0.0}
EXAMPLES = ("CBABAC", "BACCAB", "CCCBBA")
OPENING = "To be, or not to be, that is the question:"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None: it is the same for everyone."""


def run(args: argparse.Namespace) -> int:
    for needed in (SORTER, TOKENIZER):
        if not needed.is_dir():
            raise ConfigError(f"{needed} is missing: the demonstration runs from a checkout of the repository")
    began = time.monotonic()
    print("1. A trained model that sorts six letters (3 layers, 3 heads, so two ranks own 2 and 1).\n")
    with served(SORTER) as server:
        asyncio.run(_sort(server.address))
    print("\n2. A tiny GPT-2 with the real GPT-2 tokenizer. Its weights are RANDOM: watch the stream, not the prose.")
    print("   The seed makes it the same every time.\n")
    with tempfile.TemporaryDirectory() as folder:
        with served(random_text_model(Path(folder) / "tiny-gpt2")) as server:
            asyncio.run(_stream(server.address))
    print(f"\nBoth servers stopped in order. {time.monotonic() - began:.0f} s in all.")
    return 0


def random_text_model(folder: Path) -> Path:
    write_random(read(find("tiny-gpt2", "models")).values, folder)
    copy_tokenizer(TOKENIZER, folder)
    return folder


def served(model: Path) -> Server:
    """The command a user would type."""
    shown = str(model.relative_to(ROOT)) if model.is_relative_to(ROOT) else model.name
    print(f"$ tp-decoders serve --model {shown} --preset small --cluster cpu-2", flush=True)
    return Server(["--model", str(model), "--preset", "small", "--cluster", "cpu-2"])


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


async def _stream(address: str) -> None:
    async with AsyncClient(address) as client:
        print(f"  {OPENING}", end="")
        pieces = 0
        began = time.monotonic()
        sampling = {"temperature": 1.0, "seed": 7}
        async for chunk in client.stream(
            [OPENING], sampling=sampling, stopping={"max_new_tokens": 24, "ignore_eos": True}
        ):
            print(chunk.text, end="", flush=True)
            pieces += bool(chunk.token_ids)
        print(f"\n\n  24 tokens in {pieces} pieces, {time.monotonic() - began:.2f} s")


def to_ids(letters: str) -> list[int]:
    return [LETTERS.index(letter) for letter in letters]


def to_letters(ids: Sequence[int]) -> str:
    return "".join(LETTERS[token] for token in ids)
