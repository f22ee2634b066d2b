"""Messages arrive as they were, by type; an error as its kind and its words."""

from __future__ import annotations

import struct

import pytest
from msgspec import MsgspecError

from cluster.engine.request import (
    BeamParams,
    EngineLoad,
    FinishReason,
    ModelLimits,
    Pooling,
    RankReport,
    Request,
    ResponseOptions,
    SamplingParams,
    Share,
    StepReport,
    StoppingCriteria,
    Timings,
    TokenEvent,
    TokenLogprobs,
)
from cluster.engine.top_logprobs import Alternatives
from cluster.link import messages
from cluster.link.engine_link import Rejected
from cluster.link.messages import ERRORS, Message, decode, encode
from cluster.training.train_calls import (
    Kind,
    OpenSession,
    SavedName,
    StateExists,
    TrainAnswer,
    TrainCall,
    TrainSequence,
)
from parallel.errors import ConfigError, TpError
from tp_decoders.model.task_config import SummaryConfig, TaskConfig

SAID = TokenLogprobs(5, float("-inf"), Alternatives.of([(5, -0.5), (2**32 - 1, -1.5)]))
REQUEST = Request(
    request_id="日本", token_ids=(0, 2**31), priority=-3, deadline=0.1, resumed_ids=((1, 2), ()), finished_samples=(1,),
    pooling=Pooling(rows="all", normalize=True), traced=True, share=Share("a", "b", 0.5),
    sampling=SamplingParams(
        temperature=0.1, top_k=5, seed=2**64 - 1, logit_bias={7: -1.5}, allowed_token_ids=(1,),
        bad_words=((1, 2), (3,)), beam=BeamParams(width=4, early_stopping="never"),
    ),
    stopping=StoppingCriteria(max_new_tokens=5, stop_sequences=("\n", "é"), stop_token_ids=(3,)),
    response=ResponseOptions(logprobs=0, prompt_logprobs=2, echo=True),
)  # fmt: skip
EVENT = TokenEvent(
    request_id="x", sample_index=3, token_ids=(1, 2), logprobs=(SAID, TokenLogprobs(1, -0.1)), prompt_logprobs=(SAID,),
    finish_reason=FinishReason.STOP, stop_token_id=0, error="why", pooled=((0.1, -0.0),), weight_version=7,
    timings=Timings(0.1, 0.2, 0.3), score=-1.5, stop_logprob=-2.5,
    step=StepReport(
        step=1, seconds=0.5, forward_seconds=0.25, sample_seconds=0.125, tokens=3, batch_tokens=4,
        batch_sequences=5, preempted=6,
    ),
)  # fmt: skip
TASK = TaskConfig(
    name="double-heads", labels=("a", "b"), problem="regression", summary=SummaryConfig(activation="tanh")
)
LIMITS = ModelLimits(vocab_size=9, max_context=8, kv_capacity_tokens=1 << 40, eos_token_ids=(0, 1), task=TASK)
LOAD = EngineLoad(
    running=1, step_seconds=0.1, ranks=(RankReport(rank=0, node="n", pid=1, memory_bytes=2),),
    collectives={"sum": (1, 2)}, collective_seconds={"sum": 0.5},
)  # fmt: skip
CALL = TrainCall(
    kind=Kind.TRAIN_STEP, sequences=(TrainSequence(token_ids=(1, 2), advantages=(0.5,), labels=(-100, 3), mark=1),),
    loss_options={"beta": 0.1}, optimizer={"lr": 1e-3}, normaliser=2.5, expected_step=4, dropout_seed=2**63,
)  # fmt: skip
ANSWER = TrainAnswer(
    step=3, weight_version=4, loss=float("inf"), logprobs=((-0.5,), ()), metrics={"kl": 0.1},
    saved=(SavedName("a", None, 5),), sessions=(OpenSession("c", "n", 1, 0.5, 0.25),),
)  # fmt: skip


@pytest.mark.parametrize(
    "message",
    [
        messages.Hello(LIMITS, "node"),
        messages.Submit((REQUEST, Request(request_id="y", token_ids=(1,)))),
        messages.Abort(("a",), (("b", 1),)),
        messages.AskLoad(1, True),
        messages.LoadAnswer(2, LOAD),
        messages.Train(3, CALL),
        messages.CancelTrain(4),
        messages.Trained(5, ANSWER),
        messages.Events([EVENT, TokenEvent(request_id="z")]),
        messages.Fault("rank 0 on n: why"),
        messages.Beat(),
        messages.Bye(),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_message_arrives_as_it_was(message: Message) -> None:
    frame = encode(message)
    assert struct.unpack_from("!I", frame)[0] == len(frame) - 4
    back = decode(bytes(frame[4:]))
    assert back == message and repr(back) == repr(message), "the types are the same too: a tuple is no list"


def test_alternatives_stay_eight_bytes_each() -> None:
    back = decode(bytes(encode(messages.Events([EVENT]))[4:]))
    assert isinstance(back, messages.Events) and isinstance(event := back.events[0], TokenEvent)
    assert isinstance(event.logprobs[0].top, Alternatives) and len(event.logprobs[0].top.data) == 16


def error_of(error: TpError) -> TpError:
    """What arrives of it, refused at submission and by training."""
    refused = decode(bytes(encode(messages.TrainingRefused(1, error))[4:]))
    rejected = decode(bytes(encode(messages.Events([Rejected("x", error)]))[4:]))
    assert isinstance(refused, messages.TrainingRefused) and isinstance(rejected, messages.Events)
    again = rejected.events[0]
    assert isinstance(again, Rejected) and (type(again.error), str(again.error)) == (
        type(refused.error),
        str(refused.error),
    )
    return refused.error


def test_an_error_arrives_as_its_kind_and_its_words() -> None:
    for kind in ERRORS.values():
        back = error_of(kind("first line\nsecond, 日本"))
        assert type(back) is kind and str(back) == "first line\nsecond, 日本"


def test_a_kind_that_is_not_known_everywhere_arrives_as_its_nearest_ancestor() -> None:
    class DataError(ConfigError):
        pass

    back = error_of(DataError("why"))
    assert type(back) is ConfigError and str(back) == "why"
    assert str(error_of(StateExists("/caf\udce9"))) == "/caf\\udce9", "a path that is no UTF-8"


@pytest.mark.parametrize("top", [b"1234567", "12345678", [[1, 0.5]]])
def test_alternatives_of_another_form_are_refused(top: object) -> None:
    frame = bytes(encode(messages.Events([TokenEvent(request_id="x", logprobs=(TokenLogprobs(1, 0.5),))]))[4:])
    given = encode(messages.Events([TokenEvent(request_id="x", logprobs=(TokenLogprobs(1, 0.5, top),))]))[4:]  # type: ignore[arg-type]
    assert decode(frame)
    with pytest.raises(MsgspecError):
        decode(bytes(given))
