"""Large answers are made and written in pieces, and read as one message."""

from __future__ import annotations

import asyncio

import pytest

from cluster.engine.request import FinishReason, ResponseOptions, Timings, TokenLogprobs
from cluster.engine.top_logprobs import Alternatives
from cluster.frontend.output.streams import Chunk, Result
from cluster.rpc.codec.encode import PIECE, Encoder, texts, token_lists
from cluster.rpc.codec.message_pieces import joined, nested
from parallel.errors import RequestError
from tests.cluster.frontend.harness import call, run
from tp_decoders.protocol import inference_pb2 as pb

TOP = tuple((i, -float(i)) for i in range(64))
MANY = 3 * PIECE // 64
SAID = [TokenLogprobs(i, -0.5, Alternatives.of(TOP)) for i in range(MANY)]


def result(index: int) -> Result:
    said = Chunk(
        prompt_index=index, sample_index=1, text="日" * 9, token_ids=list(range(MANY)), logprobs=SAID,
        finish_reason=FinishReason.LENGTH, timings=Timings(queued=0.0, first_token=1.0, total=2.0),
    )  # fmt: skip
    return Result(prompt_index=index, prompt_logprobs=tuple(SAID[1:]), samples={0: Chunk(prompt_index=index), 1: said})


def encoder() -> Encoder:
    options = ResponseOptions(logprobs=64, prompt_logprobs=64, timings=True)
    return Encoder(call([1], response=options), "name", None)


def test_a_whole_answer_is_the_message_it_says_and_others_have_turns_meanwhile() -> None:
    async def main() -> None:
        made = asyncio.ensure_future(encoder().response([result(0), Result(prompt_index=1, error=RequestError("no"))]))
        turns = 0
        while not made.done():
            await asyncio.sleep(0)
            turns += 1
        assert turns >= 5
        message = pb.GenerateResponse.FromString(await made)
        assert message.request_id == "name" and [item.prompt_index for item in message.results] == [0, 1]
        first, second = message.results
        assert second.status.message == "no" and not second.samples
        (sample,) = first.samples
        assert sample.index == 1 and sample.text == "日" * 9 and list(sample.token_ids) == list(range(MANY))
        assert sample.finish_reason == pb.FINISH_REASON_LENGTH and sample.timings.total == 2.0
        assert len(sample.top_logprobs) == MANY and len(sample.logprobs) == MANY
        assert [(t.token_id, t.logprob) for t in sample.top_logprobs[-1].tokens] == list(TOP)
        assert [entry.token_id for entry in first.prompt_logprobs] == list(range(1, MANY))

    run(main())


def test_scores_and_chunks_are_the_messages_they_say() -> None:
    async def main() -> None:
        scores = pb.ScoreResponse.FromString(await encoder().scores([result(0), result(1)]))
        assert [item.sequence_index for item in scores.results] == [0, 1]
        assert all(len(item.top_logprobs) == len(item.logprobs) == MANY - 1 for item in scores.results)
        chunk = await encoder().chunk(result(3).samples[1])
        assert chunk.prompt_index == 3 and len(chunk.top_logprobs) == MANY and len(chunk.logprobs) == MANY

    run(main())


@pytest.mark.parametrize("size", [0, 1, 127, 128, 20_000])
def test_a_nested_piece_has_its_length_before_it(size: int) -> None:
    part = pb.TokenIds(ids=[300] * size)
    data = nested(pb.TokenizeResponse.RESULTS_FIELD_NUMBER, [part.SerializeToString()])
    assert pb.TokenizeResponse.FromString(data) == pb.TokenizeResponse(results=[part])


def test_parts_one_after_the_other_are_the_whole() -> None:
    ids = pb.TokenizeResponse.FromString(joined(token_lists([(1, 2), (), (3,)])))
    assert [list(item.ids) for item in ids.results] == [[1, 2], [], [3]]
    found = pb.DetokenizeResponse.FromString(joined(texts(["a", RequestError("no"), ""])))
    assert [item.text for item in found.results] == ["a", "", ""] and found.results[1].status.message == "no"
