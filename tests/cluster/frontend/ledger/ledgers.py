"""Ledgers as the tests of this folder make, fill and kill them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cluster.engine.request import FinishReason, Request, SamplingParams, TokenEvent, TokenLogprobs
from cluster.frontend.ledger.ledger_records import Record
from cluster.frontend.ledger.request_ledger import Ledger, LedgerConfig

ALICE, BOB = ("alice", "one"), ("bob", "one")


def ledger_at(folder: Path, origin: str = "model", clock: Callable[[], float] | None = None, **config: float) -> Ledger:
    made = LedgerConfig(**config)  # type: ignore[arg-type]
    return Ledger(folder, origin, made) if clock is None else Ledger(folder, origin, made, clock)


def begun(ledger: Ledger, key: tuple[str, str] = ALICE, prompts: int = 1) -> Record:
    asked = [Request(request_id=key[1], token_ids=(1, 2), sampling=SamplingParams(seed=3)) for _ in range(prompts)]
    record = ledger.admit(key, b"digest", asked, shown=1)
    record.open_prompts = prompts
    return record


def step(ledger: Ledger, record: Record, *tokens: int, end: bool = False, prompt: int = 0) -> None:
    reason = FinishReason.LENGTH if end else None
    logprobs = tuple(TokenLogprobs(token, -1.5) for token in tokens)
    ledger.heard(record, prompt, TokenEvent(request_id="x", token_ids=tokens, logprobs=logprobs, finish_reason=reason))
    ledger.flush()


def tokens_of(record: Record | None, prompt: int = 0) -> tuple[int, ...]:
    assert record is not None, "it was forgotten"
    return tuple(token for event in record.unpacked().events(prompt) for token in event.token_ids)


def killed(ledger: Ledger) -> None:
    """As after kill -9: nothing more is written, and the lock is free. What a thread writes is left to end."""
    ledger._items.clear()
    ledger.close()


def base_written(ledger: Ledger) -> None:
    writer = ledger.folder._base_writer
    assert writer is not None, "each ledger begins with a base"
    writer.join()


def last_log(folder: Path) -> Path:
    return max(folder.glob("*.log"))


def ended_call(ledger: Ledger, key: tuple[str, str], tokens: int) -> None:
    record = begun(ledger, key)
    step(ledger, record, *range(tokens), end=True)
    ledger.prompt_over(record, complete=True)
