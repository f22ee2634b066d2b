"""`tp-decoders generate`: a server's continuation of a prompt, streamed to the terminal.

Text goes to stdout as it comes; everything about it goes to stderr. With several samples each is printed when it is
done.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cluster.safe_text import for_terminal
from launch.client import client_flags
from parallel.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from cluster.rpc.client.client import Prompt, ServiceError
    from tp_decoders.protocol.inference_pb2 import GenerateChunk

SAMPLING = {
    "temperature": (float, "0 is greedy (default 1)"),
    "top_k": (int, "keep the k most likely tokens"),
    "top_p": (float, "keep the most likely tokens that together have this probability"),
    "min_p": (float, "keep tokens at least this share as likely as the most likely one"),
    "seed": (int, "the same seed gives the same text"),
    "n": (int, "samples (default 1)"),
    "repetition_penalty": (float, "above 1 discourages tokens already there"),
    "presence_penalty": (float, "above 0 discourages tokens already generated, once"),
    "frequency_penalty": (float, "above 0 discourages tokens already generated, each time"),
    "no_repeat_ngram_size": (int, "no run of this many tokens twice"),
    "best_of": (int, "draw this many samples and show the n with the likeliest tokens"),
}
BEAM = {
    "length_penalty": (float, "a beam's score is sum(log-probabilities) / length ^ this (default 1)"),
    "beam_groups": (int, "divide the beams into groups that avoid each other's tokens"),
    "diversity_penalty": (float, "what a token costs that an earlier group took"),
}
EARLY_STOPPING = ("false", "true", "never")
FIM_ORDERS = {"prefix": "FIM_PREFIX_FIRST", "suffix": "FIM_SUFFIX_FIRST"}
BAD_INPUT = ("INVALID_ARGUMENT", "FAILED_PRECONDITION", "UNIMPLEMENTED", "ALREADY_EXISTS")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", nargs="?", help="the prompt; - reads it from standard input")
    parser.add_argument(
        "--token-ids", help="the prompt as token ids, as in 2,1,0,1; for checkpoints without a tokenizer"
    )
    parser.add_argument("--address", default="127.0.0.1:50051", help="the server (default 127.0.0.1:50051)")
    parser.add_argument(
        "--max-new-tokens", type=int,
        help="default: as the checkpoint's generation_config.json says, else what is left of the context",
    )  # fmt: skip
    parser.add_argument("--min-new-tokens", type=int)
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-text token")
    for name, (kind, words) in SAMPLING.items():
        parser.add_argument("-n" if name == "n" else f"--{name.replace('_', '-')}", type=kind, dest=name, help=words)
    parser.add_argument("--beams", type=int, help="search with this many beams instead of drawing; -n shows several")
    for name, (kind, words) in BEAM.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=words)
    parser.add_argument("--early-stopping", choices=EARLY_STOPPING, help="end once as many as there are beams have")
    parser.add_argument("--suffix", metavar="TEXT", help="fill in the middle: what comes after the text to be written")
    parser.add_argument("--fim-order", choices=list(FIM_ORDERS), help="which part the model reads first")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="the request's deadline")
    parser.add_argument("--ids", action="store_true", help="print token ids, not text")
    parser.add_argument("--stats", action="store_true", help="say afterwards how many tokens came how fast")
    client_flags.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    check_address(args.address)
    prompt = fill_in_middle(args, prompt_of(args))
    return asyncio.run(_stream(args, prompt))


def check_address(address: str) -> None:
    host, colon, port = address.rpartition(":")
    if not (colon and host and "/" not in host and port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError(f"--address is {address!r}; write host:port, as in localhost:50051")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ConfigError(f"--address is {address!r}; write an IPv6 address in brackets, as in [::1]:50051")


def fill_in_middle(args: argparse.Namespace, prompt: str | list[int]) -> Prompt:
    """The prompt with what comes after the hole, if that was given."""
    if args.suffix is None:
        if args.fim_order is not None:
            raise ConfigError("--fim-order says in which order --suffix is read; give that too")
        return prompt
    if not isinstance(prompt, str):
        raise ConfigError("--suffix goes with a prompt of text, not of token ids")
    from tp_decoders.protocol.inference_pb2 import Prompt as Message

    order = FIM_ORDERS[args.fim_order or "prefix"]
    return Message(fim={"prefix": prompt, "suffix": checked_text("--suffix", args.suffix), "order": order})


def prompt_of(args: argparse.Namespace) -> str | list[int]:
    """The one prompt that was given, as text or ids."""
    if (args.text is None) == (args.token_ids is None):
        raise ConfigError("give the prompt either as text or with --token-ids")
    if args.text is None:
        return parse_ids(args.token_ids)
    if args.text == "-" and sys.stdin is None:
        raise ConfigError("the prompt is -, standard input, which is closed; give it as text, or as in < FILE")
    return checked_text("the prompt", args.text, sys.stdin.read if args.text == "-" else None)


def checked_text(what: str, text: str, read: Callable[[], str] | None = None) -> str:
    """A text that was typed, or is read, if it is one: bytes of another encoding are no characters."""
    try:
        text = read() if read else text
        text.encode()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise ConfigError(
            f"{what} is not in this terminal's encoding ({getattr(sys.stdin, 'encoding', 'none')}): {error.reason} at "
            f"{error.start}; convert it, or set LC_ALL to the locale it is in"
        ) from error
    return text


def parse_ids(text: str) -> list[int]:
    words = text.replace(",", " ").split()
    if not words or not all(word.isdigit() for word in words):
        raise ConfigError(f"--token-ids is {text!r}; write numbers, as in 2,1,0,1")
    return [int(word) for word in words]


def request_fields(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Only what was asked for: the server's defaults hold for the rest."""
    sampling = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    if (beam := beam_fields(args)) is not None:
        sampling["beam"] = beam
    stops = [checked_text("--stop", stop) for stop in args.stop]
    stopping: dict[str, Any] = {"stop_sequences": stops, "ignore_eos": args.ignore_eos}
    for name in ("max_new_tokens", "min_new_tokens"):
        if getattr(args, name) is not None:
            stopping[name] = getattr(args, name)
    return {"sampling": sampling, "stopping": stopping}


def beam_fields(args: argparse.Namespace) -> dict[str, Any] | None:
    """The protocol's Beam, where beams were asked for."""
    given = {name.removeprefix("beam_"): getattr(args, name) for name in BEAM if getattr(args, name) is not None}
    if args.early_stopping is not None:
        given["early_stopping"] = f"EARLY_STOPPING_{args.early_stopping.upper()}"
    if args.beams is None and given:
        raise ConfigError("--length-penalty, --early-stopping, --beam-groups and --diversity-penalty need --beams")
    return None if args.beams is None else {"width": args.beams, **given}


@dataclass
class _Printer:
    """Writes one sample as it comes, or several one after the other: text, or ids where the server has none."""

    as_ids: bool
    streaming: bool
    tokens: int = 0
    reasons: list[int] = field(default_factory=list)
    parts: dict[int, list[str]] = field(default_factory=dict)

    def take(self, chunk: GenerateChunk) -> None:
        if chunk.HasField("prompt"):
            self.as_ids = self.as_ids or not chunk.prompt.has_text
        self.tokens += len(chunk.token_ids)
        piece = "".join(f"{token} " for token in chunk.token_ids) if self.as_ids else chunk.text
        if sys.stdout.isatty():  # a file or a program gets every character
            piece = for_terminal(piece)
        if self.streaming:
            print(piece, end="", flush=True)
        else:
            self.parts.setdefault(chunk.sample_index, []).append(piece)
        if chunk.finish_reason:
            self.reasons.append(chunk.finish_reason)
            if not self.streaming:
                score = f"  score {chunk.score:.4f}" if chunk.HasField("score") else ""
                print(f"--- sample {chunk.sample_index}{score}\n{''.join(self.parts.pop(chunk.sample_index))}")
            else:
                print()


async def _stream(args: argparse.Namespace, prompt: Prompt) -> int:
    from cluster.rpc.client.client import AsyncClient, ServiceError
    from tp_decoders.protocol.inference_pb2 import FinishReason

    began = time.monotonic()
    async with AsyncClient(args.address, client_flags.access_of(args)) as client:
        try:
            fields = request_fields(args)
            printer = _Printer(args.ids, (args.n or 1) == 1)
            async for chunk in client.stream([prompt], timeout=args.timeout, **fields):
                printer.take(chunk)
        except ServiceError as error:
            raise _named(error, args.address) from error
        except ValueError as error:  # a number that the protocol's field cannot hold
            raise RequestError(f"a number is out of range: {error}") from error
    if args.stats:
        seconds = time.monotonic() - began
        reasons = ", ".join(FinishReason.Name(reason).removeprefix("FINISH_REASON_") for reason in printer.reasons)
        print(f"{printer.tokens} tokens in {seconds:.2f} s; ended by {reasons}", file=sys.stderr)
    return 0


def _named(error: ServiceError, address: str) -> Exception:
    """The service's error with the address, as bad input where the request was at fault."""
    name = getattr(error.code, "name", "")
    kind = RequestError if name in BAD_INPUT else type(error)
    return kind(f"{address}: {error}")
