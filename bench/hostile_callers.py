"""What a hostile caller costs a calm one on the same real server: its first token and the time between its tokens,
alone and beside calls that are as expensive as the server lets them be.

    python bench/hostile_callers.py --model FOLDER --tp 2 [--only beams,scores]

The calm caller reads one stream of `--tokens` tokens after the other; the hostile one, with a token of its own, repeats
one kind of call without a pause. Prints for each kind: what the hostile calls were answered, the calm caller's median
and longest first token and gap, and both medians against those of the calm minutes. The model's context should hold
1,024 tokens. A further kind is one more entry in HOSTILE.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.access.access_config import Access
from cluster.rpc.client.client import AsyncClient, ServiceError
from launch.commands.server_process import Server

NAMES = ("calm", "hostile")
MANY = 48_000
URGENT = -1_000_000
LONG_STOPS = ["ab" * 500 + chr(300 + i) for i in range(64)]
Attack = Callable[[AsyncClient], Awaitable[Any]]


def generating(prompts: list[list[int]], new: int, sampling: dict[str, Any] | None = None, **more: Any) -> Attack:
    stopping = {"max_new_tokens": new, "ignore_eos": True, **more.pop("stopping", {})}
    return lambda client: client.generate(prompts, sampling=sampling or {}, stopping=stopping, timeout=300, **more)


def at_once(attack: Attack, count: int) -> Attack:
    """So many of the same call."""

    async def calls(client: AsyncClient) -> None:
        await asyncio.gather(*(attack(client) for _ in range(count)))

    return calls


HOSTILE: dict[str, Attack] = {
    "beams": generating([[5, 6, 7]], 20, {"beam": {"width": 64}}, stopping={"stop_token_ids": list(range(60, MANY))}),
    "beams that change rows": generating([[5, 6, 7]], 20, {"beam": {"width": 64}, "repetition_penalty": 1.2}),
    "bad words": generating([[9] * 900], 40, {"n": 64, "bad_word_ids": [{"ids": [9] * 64}] * 1000}),
    "biases": generating([[5] * 8], 40, {"n": 64, "logit_bias": dict.fromkeys(range(MANY), 0.5)}),
    "alternatives": generating([[5] * 8], 100, {"n": 64}, response={"logprobs": 64}),
    "stop strings": generating([[5] * 8], 60, {"n": 64}, stopping={"stop_sequences": LONG_STOPS}),
    "thousand prompts": generating([[5 + i % 500] * 60 for i in range(1000)], 30),
    "64 urgent streams": at_once(generating([[5, 6]], 200, priority=URGENT), 64),
    "long prompts": at_once(generating([[7, 8] * 400], 1, priority=URGENT), 32),
    "scores": lambda client: client.score([[5 + i % 50] * 1000 for i in range(64)], top_logprobs=64, timeout=300),
    "scores too large": lambda client: client.score([[5] * 1000] * 512, top_logprobs=64, timeout=300),
    "plain scores": lambda client: client.score([[5 + i % 50] * 1000 for i in range(256)], timeout=300),
}  # fmt: skip


@dataclass
class Seen:
    """The calm caller's waits, in seconds."""

    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)


async def calm(client: AsyncClient, tokens: int, until: Callable[[], bool], seen: Seen) -> None:
    number = 0
    while not until():
        number, last, first = number + 1, time.monotonic(), True
        prompt = [11 + number % 97, 13, number % 89]
        async for _ in client.stream([prompt], stopping={"max_new_tokens": tokens, "ignore_eos": True}):
            now = time.monotonic()
            (seen.first if first else seen.gaps).append(now - last)
            last, first = now, False


async def hostile(client: AsyncClient, attack: Attack, until: Callable[[], bool], answers: Counter[str]) -> None:
    while not until():
        try:
            await attack(client)
            answers["OK"] += 1
        except ServiceError as error:
            answers[error.reason or error.code.name] += 1
            await asyncio.sleep(0.05)


async def measured(
    clients: dict[str, AsyncClient], args: argparse.Namespace, attack: Attack | None
) -> tuple[Seen, Counter[str]]:
    end, seen, answers = time.monotonic() + args.seconds, Seen(), Counter[str]()

    def until() -> bool:
        return time.monotonic() > end

    attacks = [] if attack is None else [asyncio.create_task(hostile(clients["hostile"], attack, until, answers))]
    await calm(clients["calm"], args.tokens, until, seen)
    for task in attacks:
        task.cancel()
    await asyncio.gather(*attacks, return_exceptions=True)
    await asyncio.sleep(1.0)  # what was cancelled has left the engine
    return seen, answers


def shown(seconds: list[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:7.0f} ms, most {max(seconds) * 1e3:7.0f} ms" if seconds else "none"


async def measure(address: str, folder: Path, args: argparse.Namespace) -> int:
    clients = {name: AsyncClient(address, Access(token_file=str(folder / name))) for name in NAMES}
    alone, _ = await measured(clients, args, None)
    print(f"{'calm':24} first token {shown(alone.first)} | between {shown(alone.gaps)}")
    for name, attack in HOSTILE.items():
        if args.only and name not in args.only.split(","):
            continue
        seen, answers = await measured(clients, args, attack)
        ratios = [
            f"{statistics.median(mine) / statistics.median(quiet):.1f} x" if mine else "none"
            for mine, quiet in ((seen.first, alone.first), (seen.gaps, alone.gaps))
        ]
        print(f"{name:24} first token {shown(seen.first)} ({ratios[0]}) | between {shown(seen.gaps)} ({ratios[1]})")
        print(f"{'':24} answered {dict(answers) or 'nothing yet'}", flush=True)
    for client in clients.values():
        await client.close()
    return 0


def write_tokens(folder: Path) -> str:
    """One token file for the server, and each caller's own."""
    path = folder / "tokens.toml"
    path.touch(0o600)
    lines = []
    for name in NAMES:
        token = f"the-token-of-the-{name}-caller"
        (folder / name).touch(0o600)
        (folder / name).write_text(token)
        lines.append(f'[{name}]\ntoken = "{token}"\nroles = ["generate"]\n')
    path.write_text("\n".join(lines))
    return str(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each kind")
    parser.add_argument("--tokens", type=int, default=100, help="of each calm stream")
    parser.add_argument("--only", default="", help="kinds, with commas between them")
    parser.add_argument("settings", nargs="*", help="of the server, such as engine.kv_blocks=6000")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            "--model",
            args.model,
            "--tp",
            str(args.tp),
            "--token-file",
            write_tokens(Path(folder)),
            *args.settings,
        ]
        with Server(arguments) as server:
            return asyncio.run(measure(server.address, Path(folder), args))


if __name__ == "__main__":
    sys.exit(main())
