"""What a record says becomes bytes and is the same again; whatever else bytes say is refused."""

from __future__ import annotations

import msgspec
import pytest

from cluster.engine.request import (
    BeamParams,
    FinishReason,
    Pooling,
    Request,
    ResponseOptions,
    SamplingParams,
    Share,
    StoppingCriteria,
    Timings,
    TokenEvent,
    TokenLogprobs,
)
from cluster.engine.top_logprobs import Alternatives
from cluster.frontend.ledger.ledger_records import (
    UNREADABLE,
    Content,
    Deaths,
    Origin,
    Over,
    Progress,
    Record,
    Steps,
    digest_of,
    dumps,
    loads,
    unpack,
    values_of,
)
from cluster.frontend.requests.quarantine import Count
from cluster.request_errors import DoesNotFit, InvalidRequest, NoTokenizer, Quarantined, Violation
from parallel.errors import CapacityError, QueueFull, RequestError
from tests.cluster.frontend.harness import call


def test_the_digest_is_of_what_decides_on_the_answer() -> None:
    bias = {5: 1.0, 3: 2.0}
    one = call([1, 2], sampling=SamplingParams(seed=1, logit_bias=bias), request_id="a", deadline=3.0, priority=1)
    same = call([1, 2], sampling=SamplingParams(seed=1, logit_bias=dict(reversed(bias.items()))), request_id="b")
    assert digest_of(one) == digest_of(same)
    assert len({digest_of(c) for c in (one, call([1, 2]), call([1]), call("ab"), call([1, 2], score=True))}) == 5


SCORED = (TokenLogprobs(5, -0.1, Alternatives.of([(5, -0.1), (7, -2.5)])), TokenLogprobs(7, -0.3))


def test_a_request_is_read_as_it_was_asked() -> None:
    sampling = SamplingParams(
        temperature=0.7, top_k=5, top_p=0.9, seed=2**64 - 1, n=2, logit_bias={5: 1.5, 3: -2.0},
        allowed_token_ids=(1, 2), bad_words=((1, 2), (3,)), beam=BeamParams(width=3, early_stopping="never"),
    )  # fmt: skip
    asked = Request(
        request_id="one", token_ids=tuple(range(300)), sampling=sampling, deadline=2.5, pooling=Pooling(rows="mean"),
        stopping=StoppingCriteria(max_new_tokens=9, stop_sequences=("\n", "ende\u0301"), stop_token_ids=(4,)),
        response=ResponseOptions(logprobs=3), resumed_ids=((1, 2), ()), finished_samples=(1,), share=Share("a", "b", 2),
    )  # fmt: skip
    content = unpack(dumps(Content((asked, Request(request_id="two", token_ids=(1,))), 2)))
    assert content.requests == (asked, Request(request_id="two", token_ids=(1,))) and content.shown == 2
    assert isinstance(content.requests[0], Request) and type(content.requests[0].sampling.bad_words[0]) is tuple


@pytest.mark.parametrize(
    "event",
    [
        TokenEvent(request_id="", token_ids=(1, 2), logprobs=SCORED, weight_version=3),
        TokenEvent(request_id="", prompt_logprobs=SCORED, finish_reason=FinishReason.STOP, stop_token_id=5),
        TokenEvent(request_id="", sample_index=2, finish_reason=FinishReason.LENGTH, timings=Timings(0.5, 1.0, 2.0)),
        TokenEvent(request_id="", pooled=((0.5, -1e-30), (float("inf"), 2.0)), finish_reason=FinishReason.LENGTH),
        TokenEvent(request_id="", score=-3.25, stop_logprob=-0.5, error="text"),
    ],
)
def test_an_event_is_read_as_it_was_heard(event: TokenEvent) -> None:
    values = values_of(event)
    content = unpack(dumps(Content((), 1, {(4, event.sample_index): values})))
    assert content.events(4) == [event] and not content.events(3)
    steps = loads(dumps(Steps([(1, 0, 4, event.sample_index, values)])))
    assert isinstance(steps, Steps)
    assert unpack(dumps(Content((), 1, {(4, event.sample_index): steps.items[0][4]}))).events(4) == [event]


def test_a_refusal_is_read_as_it_was_given() -> None:
    quarantined, full = Quarantined("twice"), QueueFull("no room now")
    quarantined.deaths, quarantined.causes = 2, ("one", "two")
    given: tuple[RequestError, ...] = (
        InvalidRequest.of([Violation("sampling.top_k", "must be at least 1")]), DoesNotFit.of("prompts", "too long"),
        NoTokenizer("none"), CapacityError("too many"), RequestError("no"), quarantined, full,
    )  # fmt: skip
    read = unpack(dumps(Content(given, 1))).requests
    kinds = [type(error) for error in read]
    assert kinds == [InvalidRequest, DoesNotFit, NoTokenizer, CapacityError, RequestError, Quarantined, CapacityError]
    assert [str(error) for error in read] == [str(error) for error in given]
    assert [vars(error) for error in read[:-1]] == [vars(error) for error in given[:-1]]


def test_lines_are_read_as_they_were_written_and_anything_else_is_refused() -> None:
    record = Record(number=7, key=("alice", "one"), digest=b"digest", admitted=1.5, progress=Progress.PARKED, items=3)
    record.content = Content((Request(request_id="one", token_ids=(1,)),), 1)
    again = loads(dumps(record.line()))
    assert isinstance(again, Record) and again.unpacked().requests == record.content.requests and not again.open_prompts
    facts = ("number", "key", "digest", "admitted", "progress", "over", "items")
    assert [getattr(again, name) for name in facts] == [getattr(record, name) for name in facts]
    for line in (Origin("model"), Over(3, None), Deaths(b"key", Count(("one",), True, 2.0)), Deaths(b"key", None)):
        assert loads(dumps(line)) == line
    lines: list[object] = [7, ["X", 1], ["E", "three", None], ["S", [[1, 2]]], ["R", 1], {"O": "model"}, ["Q", b"k", 4]]
    for value in lines:
        with pytest.raises(UNREADABLE):
            loads(msgspec.msgpack.encode(value))
    asked: list[object] = [["Exception", "x", {}], ["RequestError", "x"], 7, {"token_ids": "x"}]
    for value in asked:
        with pytest.raises(UNREADABLE):
            unpack(msgspec.msgpack.encode(([value], 1, {})))
