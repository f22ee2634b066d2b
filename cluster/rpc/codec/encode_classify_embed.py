"""Answers to prompts that were read (Classify, Embed) to response messages. What logits mean is
requests.classify_embed's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cluster.engine.request import FinishReason, ModelLimits
from cluster.frontend.output.output_text import TextCodec
from cluster.frontend.output.streams import Result
from cluster.frontend.requests.call import Call
from cluster.frontend.requests.classify_embed import Reading, Row, Scores, best_spans, scores_of, softmax
from cluster.request_errors import ReadingEnded
from cluster.rpc.codec.error_status import status_of
from parallel.errors import TpError
from tp_decoders.model.task_config import CHOICES, SPANS, TOKENS, TaskConfig
from tp_decoders.protocol import inference_pb2 as pb


def classes(
    call: Call, results: Sequence[Result], request_id: str, limits: ModelLimits, codec: TextCodec | None
) -> Iterator[pb.ClassifyResponse]:
    """A head's answers, as parts of one."""
    task, reading = limits.task, call.reading
    assert task is not None and reading is not None, "checked at admission"
    yield pb.ClassifyResponse(request_id=request_id, task=task.name, labels=task.labels)
    for result in results:
        yield pb.ClassifyResponse(results=[_class(result, task, reading, codec)])
    if task.name == CHOICES:
        yield pb.ClassifyResponse(choices=_choices(results, reading.num_choices or len(results)))


def embeddings(results: Sequence[Result], request_id: str) -> Iterator[pb.EmbedResponse]:
    """Parts of one answer."""
    yield pb.EmbedResponse(request_id=request_id)
    for result in results:
        yield pb.EmbedResponse(results=[_embedding(result)])


def _embedding(result: Result) -> pb.EmbedResult:
    rows, version, error = _pooled(result)
    tokens = result.prompt.num_tokens if result.prompt else 0
    return pb.EmbedResult(
        sequence_index=result.prompt_index,
        status=status_of(error),
        values=rows[0] if rows else (),
        tokens=tokens,
        weight_version=version,
    )


def _pooled(result: Result) -> tuple[Sequence[Row], int, TpError | None]:
    """The rows of an answer and its version of the weights, or why there are none."""
    chunk = result.samples.get(0)
    if result.error is not None or chunk is None:
        return (), 0, result.error
    if chunk.pooled is None:
        return (), 0, ReadingEnded(_ended(chunk.finish_reason))
    return chunk.pooled, chunk.weight_version, None


def _ended(reason: FinishReason | None) -> str:
    return f"the request ended before its answer was there: {reason.value if reason else 'unknown'}"


def _class(result: Result, task: TaskConfig, reading: Reading, codec: TextCodec | None) -> pb.ClassifyResult:
    rows, version, error = _pooled(result)
    message = pb.ClassifyResult(sequence_index=result.prompt_index, status=status_of(error), weight_version=version)
    if error is not None:
        return message
    ids = result.prompt.token_ids if result.prompt else ()
    message.token_ids.extend(ids)
    if task.name == TOKENS:
        message.tokens.extend(_scores(scores_of(row, task), task) for row in rows)
    elif task.name == SPANS:
        message.start_logits.extend(row[0] for row in rows)
        message.end_logits.extend(row[1] for row in rows)
        for span in best_spans(rows, reading.num_spans, reading.max_answer_tokens):
            text = codec.tokenizer.decode(ids[span.start : span.end + 1]) if codec else ""
            message.spans.add(start=span.start, end=span.end, score=span.score, text=text)
    elif task.name == CHOICES:
        message.scores.CopyFrom(pb.LabelScores(logits=rows[0]))
    else:
        message.scores.CopyFrom(_scores(scores_of(rows[0], task), task))
    return message


def _scores(scores: Scores, task: TaskConfig) -> pb.LabelScores:
    label = "" if scores.label_id is None else task.labels[scores.label_id]
    return pb.LabelScores(
        logits=scores.logits, probabilities=scores.probabilities, label_id=scores.label_id, label=label
    )


def _choices(results: Sequence[Result], size: int) -> list[pb.ChoiceResult]:
    """Of each question all of whose choices were answered by one number."""
    made = []
    for first in range(0, len(results), size):
        found = [rows for rows, _, _ in map(_pooled, results[first : first + size])]
        if all(rows and len(rows[0]) == 1 for rows in found):
            likely = softmax([rows[0][0] for rows in found])
            made.append(pb.ChoiceResult(first_sequence=first, probabilities=likely, best=likely.index(max(likely))))
    return made
