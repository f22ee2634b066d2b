"""What a call will cost at most, known before it is admitted: the bytes of its answer, and the entries of its lists.

An answer that is one message must fit a message. Its numbers are counted at their largest; its text, whose length
nobody knows, at TEXT_BYTES for a token, which no text of a language reaches on average. What would be too much is
refused with the estimate, the limit and how to split the call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized

from cluster.engine.request import ModelLimits, Request
from cluster.frontend.requests.call import Call, FrontendConfig
from cluster.request_errors import DoesNotFit
from parallel.errors import RequestError
from tp_decoders.model.task_config import SPANS, TOKENS

ID_BYTES = 5
LOGPROB_BYTES = 5
ALTERNATIVE_BYTES = 2 + 1 + ID_BYTES + LOGPROB_BYTES
"""An id and a number in a message of their own."""
PIECE_BYTES = 8
"""The head of a list of alternatives, or of a token's bytes."""
TEXT_BYTES = 16
ITEM_BYTES = 1024
"""A prompt's own: its index, its parameters, or the status of one that failed."""
STATE_BYTES = 4


def check_lists(call: Call, config: FrontendConfig) -> None:
    """Of lists that every prompt of the call is given: they are prepared for each."""
    sampling, prompts = call.sampling, len(call.prompts)
    lists: dict[str, int] = {
        "sampling.logit_bias": len(sampling.logit_bias),
        "sampling.allowed_token_ids": len(sampling.allowed_token_ids or ()),
        "sampling.bad_words": sum(map(len, (*call.bad_words, *sampling.bad_words))),
        "stopping.stop_token_ids": len(call.stopping.stop_token_ids),
    }
    field = max(lists, key=lambda name: lists[name])
    if lists["sampling.bad_words"] > config.max_id_list:
        given = f"{lists['sampling.bad_words']} characters and token ids in all words"
        raise DoesNotFit.of("sampling.bad_words", f"{given}; at most {config.max_id_list} are allowed: give fewer")
    total, most = sum(lists.values()) * prompts, config.max_list_entries
    if total > most:
        entries = f"{sum(lists.values())} entries of lists for each of {prompts} prompts are {total}"
        raise DoesNotFit.of(field, f"{entries}; a call may have {most}: send {_parts(prompts, most, total)}")


def check_answer(call: Call, made: Sequence[Request | RequestError], limits: ModelLimits) -> None:
    """Of a call that is answered by one message."""
    if call.answer_bytes is None:
        return
    size = _size_of(call)
    sizes = [ITEM_BYTES if isinstance(item, RequestError) else ITEM_BYTES + size(item, limits) for item in made]
    total, most = sum(sizes), call.answer_bytes
    if total > most:
        answer = f"the answer would be up to {total} bytes long, the largest of {len(made)} {call.prompts_field} "
        whole = f"{answer}{max(sizes)}; a message holds {most}"
        raise DoesNotFit.of(call.prompts_field, f"{whole}: {_advice(call, len(made), max(sizes), most, total)}")


def check_converted(field: str, items: Sequence[Sized], each: int, most: int | None) -> None:
    """Of texts that become ids, or ids that become text: `each` bytes for each character or id."""
    total = sum(len(item) * each + PIECE_BYTES for item in items)
    if most is not None and total > most:
        answer = f"the answer would be up to {total} bytes long; a message holds {most}"
        raise DoesNotFit.of(field, f"{answer}: send {_parts(len(items), most, total)}, or shorter ones")


def _advice(call: Call, count: int, largest: int, most: int, total: int) -> str:
    less = "ask for fewer alternatives" if call.score else "lower max_new_tokens, n or logprobs, or use GenerateStream"
    if call.reading is not None:
        less = "send shorter ones"
    return less if largest > most or count == 1 else f"send {_parts(count, most, total)}, or {less}"


def _parts(count: int, most: int, total: int) -> str:
    return f"at most {max(1, count * most // total)} at a time"


def _size_of(call: Call) -> Callable[[Request, ModelLimits], int]:
    return _scored if call.score else _read if call.reading is not None else _generated


def _scored(request: Request, limits: ModelLimits) -> int:
    top = min(request.response.prompt_logprobs or 0, limits.vocab_size)
    return len(request.token_ids) * (ID_BYTES + LOGPROB_BYTES + (PIECE_BYTES + top * ALTERNATIVE_BYTES if top else 0))


def _generated(request: Request, limits: ModelLimits) -> int:
    given, response = request.sampling, request.response
    asked = response.logprobs is not None
    each = ID_BYTES + TEXT_BYTES + (LOGPROB_BYTES if asked else 0)
    each += (
        (PIECE_BYTES + min(response.logprobs or 0, limits.vocab_size) * ALTERNATIVE_BYTES) if response.logprobs else 0
    )
    each += PIECE_BYTES + TEXT_BYTES if response.token_bytes else 0
    prompt = len(request.token_ids) * (ID_BYTES + given.n * TEXT_BYTES) if response.echo else 0
    if response.prompt_logprobs is not None:
        top = min(response.prompt_logprobs, limits.vocab_size)
        prompt += len(request.token_ids) * (PIECE_BYTES + ID_BYTES + LOGPROB_BYTES + top * ALTERNATIVE_BYTES)
    return prompt + given.n * (ITEM_BYTES + (request.stopping.max_new_tokens or 0) * each)


def _read(request: Request, limits: ModelLimits) -> int:
    tokens, task, pooling = len(request.token_ids), limits.task, request.pooling
    if pooling is not None and not pooling.head:
        return limits.state_size * STATE_BYTES
    labels = task.num_labels if task is not None else 0
    if task is not None and task.name in (TOKENS, SPANS):
        return tokens * (ID_BYTES + PIECE_BYTES + labels * 2 * STATE_BYTES + TEXT_BYTES)
    return labels * 2 * STATE_BYTES
