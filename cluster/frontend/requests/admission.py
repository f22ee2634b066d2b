"""From a call to engine requests: rules first, then tokenization, then each prompt on its own.

What is wrong with the call as a whole is raised; what is wrong with one prompt is returned in its place, because the
others go on. Holds no state: the journal decides whether there is room.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from cluster.engine.guided.guides import Guides
from cluster.engine.request import Guide, ModelLimits, Request, SamplingParams
from cluster.engine.request_validation import check_capacity, room, what_is_left
from cluster.engine.rng import fresh_seed
from cluster.frontend.output.output_text import TextCodec
from cluster.frontend.requests.call import Call, FillInMiddle, FrontendConfig, Prompt
from cluster.frontend.requests.call_costs import ID_BYTES, TEXT_BYTES, check_converted, check_lists
from cluster.frontend.requests.classify_embed import Reading, check_task, matters, pooling_of
from cluster.frontend.requests.offload import FairThreadPool
from cluster.frontend.requests.parameter_rules import token_ids, violations
from cluster.request_errors import DoesNotFit, InvalidRequest, NoTokenizer, Violation
from parallel.errors import RequestError

TURN = 16
"""Prompts that are made ready between two looks at others."""
NO_TOKENIZER = "this checkpoint has no tokenizer; send token ids (token_ids, bad_word_ids, stop_token_ids)"


@dataclass(frozen=True, kw_only=True)
class Admission:
    """Turns calls into requests for one model."""

    limits: ModelLimits
    config: FrontendConfig
    codec: TextCodec | None
    pool: FairThreadPool = field(default_factory=FairThreadPool)
    guides: Guides = field(default_factory=lambda: Guides(lambda: None))

    def check(self, call: Call) -> None:
        """Raise what is wrong with the call as a whole."""
        check_task(call.reading, self.limits.task)
        found = tuple(violations(call, self.limits, self.config))
        if found:
            raise InvalidRequest.of(found)
        check_lists(call, self.config)
        if self.codec is None:
            asked = {
                "sampling.bad_words": call.bad_words,
                "stopping.stop_sequences": call.stopping.stop_sequences,
                "response.token_bytes": call.response.token_bytes,
            }
            for field in (field for field, value in asked.items() if value):
                raise NoTokenizer(f"{field}: {NO_TOKENIZER}")

    async def requests(self, call: Call) -> list[Request | RequestError]:
        """One request per prompt, or what is wrong with that prompt. Long texts are tokenized beside the event loop."""
        caller, words = call.share.caller, call.bad_words
        await self._compiled(call.sampling.guide, caller)
        banned = await self.pool.run(caller, self._banned, words) if words else ()
        sampling = replace(call.sampling, bad_words=call.sampling.bad_words + banned)
        made: list[Request | RequestError] = []
        for index, prompt in enumerate(call.prompts):
            if index % TURN == TURN - 1:
                await asyncio.sleep(0)  # others' calls have their turn
            try:
                ids = await self._token_ids(prompt, f"{call.prompts_field}[{index}]", caller)
                made.append(self._request(call, ids, sampling, index))
            except RequestError as error:
                made.append(error)
        return made

    async def _compiled(self, guide: Guide | None, caller: str) -> None:
        """Raises where the grammar cannot be followed; beside the event loop, for a limited time."""
        if guide is None or self.guides.known(guide):
            return
        try:
            async with asyncio.timeout(self.config.max_guide_seconds):
                await self.pool.run(caller, self.guides.compiled, guide)
        except TimeoutError:
            most = f"takes longer to compile than {self.config.max_guide_seconds:g} s; give a simpler one"
            raise _invalid(f"sampling.structured_outputs.{guide.kind}", most) from None

    def encode(self, text: str, whole: bool = True) -> tuple[int, ...]:
        """The ids of a text, or of a part of one (not `whole`), which has no first and last token of its own."""
        if self.codec is None:
            raise NoTokenizer(NO_TOKENIZER)
        return tuple(self.codec.tokenizer.encode(text, add_special_tokens=whole))

    def decode(self, ids: Sequence[int], field: str) -> str | RequestError:
        """The text of tokens, or what is wrong with them."""
        if self.codec is None:
            return NoTokenizer(f"{field}: {NO_TOKENIZER}")
        try:
            return self.codec.tokenizer.decode(self._checked(ids, 0, field))
        except RequestError as error:
            return error

    async def encode_bounded(self, text: str, field: str, caller: str, whole: bool = True) -> tuple[int, ...]:
        """`encode`, of longer texts beside the event loop; refused where the text is too long to fit."""
        if self.codec is None:
            raise NoTokenizer(f"{field}: {NO_TOKENIZER}")
        self._check_length(text, field)
        if len(text) > self.config.inline_chars:
            return await self.pool.run(caller, self.encode, text, whole)
        if len(text) > self.config.inline_chars // TURN:  # many such are long together
            await asyncio.sleep(0)
        return self.encode(text, whole)

    def _check_length(self, text: str, field: str) -> None:
        most = self.limits.max_context * self.config.max_chars_per_token
        if len(text) > most:
            holds = f"the context of {self.limits.max_context} tokens never holds more than {most}"
            raise DoesNotFit.of(field, f"{len(text)} characters; {holds}; shorten it")

    async def all_ids(
        self, texts: Sequence[str], caller: str, answer_bytes: int | None, whole: bool = True
    ) -> list[tuple[int, ...]]:
        """Of texts that are only tokenized: together they fit a message."""
        self._check_count("texts", len(texts))
        for index, text in enumerate(texts):
            self._check_length(text, f"texts[{index}]")
        check_converted("texts", texts, ID_BYTES, answer_bytes)
        found = []
        for index, text in enumerate(texts):
            if index % TURN == TURN - 1:
                await asyncio.sleep(0)
            found.append(await self.encode_bounded(text, f"texts[{index}]", caller, whole))
        return found

    async def all_texts(
        self, sequences: Sequence[Sequence[int]], caller: str, answer_bytes: int | None
    ) -> list[str | RequestError]:
        """The text of each sequence, or what is wrong with it; of many tokens beside the event loop."""
        self._check_count("sequences", len(sequences))
        check_converted("sequences", sequences, TEXT_BYTES, answer_bytes)

        def texts() -> list[str | RequestError]:
            return [self.decode(ids, f"sequences[{i}]") for i, ids in enumerate(sequences)]

        few = sum(map(len, sequences)) <= self.config.inline_chars
        return texts() if few else await self.pool.run(caller, texts)

    def _check_count(self, field: str, count: int) -> None:
        most = self.config.max_prompts_per_call
        if not 1 <= count <= most:
            raise _invalid(field, f"{count} given; a call takes 1 to {most}")

    async def _token_ids(self, prompt: Prompt, field: str, caller: str) -> Sequence[int]:
        if sum(given is not None for given in (prompt.text, prompt.token_ids, prompt.fim)) != 1:
            raise _invalid(field, "give exactly one of text, token_ids and fim")
        if prompt.token_ids is not None:
            return prompt.token_ids
        if prompt.fim is not None:
            return await self._fill_in_middle(prompt.fim, f"{field}.fim", caller)
        return self._known(await self.encode_bounded(prompt.text or "", field, caller), field)

    async def _fill_in_middle(self, fim: FillInMiddle, field: str, caller: str) -> Sequence[int]:
        """Prefix, suffix, then the middle is the model's to write; or the suffix first and then the prefix with it.

        What the tokenizer puts before every text comes once, before all of it.
        """
        prefix = self._known(await self.encode_bounded(fim.prefix, f"{field}.prefix", caller, False), f"{field}.prefix")
        suffix = self._known(await self.encode_bounded(fim.suffix, f"{field}.suffix", caller, False), f"{field}.suffix")
        marks, first = (self.codec.fim, self.codec.first_ids) if self.codec else (None, ())
        if marks is None:
            raise _invalid(field, "this model's vocabulary has no fill-in-the-middle tokens; send text or token_ids")
        if fim.suffix_first:
            return (*first, marks.prefix, marks.suffix, *suffix, marks.middle, *prefix)
        return (*first, marks.prefix, *prefix, marks.suffix, *suffix, marks.middle)

    def _known(self, ids: tuple[int, ...], field: str) -> tuple[int, ...]:
        """The ids of a text, which a tokenizer with more tokens than the model can put beyond its vocabulary."""
        if ids and max(ids) >= self.limits.vocab_size and self.codec is not None:
            wrong = max(ids)
            shown = self.codec.tokenizer.token_bytes(wrong).decode("utf-8", "replace")
            raise _invalid(
                field,
                f"holds {shown!r}, which is token {wrong} of the tokenizer; this model's are 0 to "
                f"{self.limits.vocab_size - 1}",
            )
        return ids

    def _request(self, call: Call, given: Sequence[int], sampling: SamplingParams, index: int) -> Request:
        field = f"{call.prompts_field}[{index}]"
        ids = self._checked(given, 2 if call.score else 1, field)
        if call.reading is not None:
            return self._read(call, call.reading, ids, index)
        if sampling.seed is None and not call.score:
            sampling = replace(sampling, seed=fresh_seed())
        request = Request(
            request_id=call.request_id,
            token_ids=ids,
            sampling=sampling,
            stopping=call.stopping,
            response=call.response,
            priority=call.level,
            deadline=call.deadline,
            score_only=call.score,
            share=call.share,
        )
        return request if call.score else self._resolved(request, field)

    def _read(self, call: Call, reading: Reading, ids: tuple[int, ...], index: int) -> Request:
        request = Request(
            request_id=call.request_id,
            token_ids=matters(ids, reading, self.limits.task, index),
            priority=call.level,
            deadline=call.deadline,
            pooling=pooling_of(reading, self.limits),
            share=call.share,
        )
        check_capacity(request, self.limits)
        return request

    def _resolved(self, request: Request, field: str) -> Request:
        """max_new_tokens becomes what is left of the context where more than fits, or nothing, was asked for."""
        fits, stopping = room(request, self.limits), request.stopping
        if fits < 1:
            raise DoesNotFit.of(field, f"{len(request.token_ids)} tokens leave no room for a new one: {self._room()}")
        most = stopping.max_new_tokens
        if most is None or most > fits:
            most = what_is_left(request, self.limits)
        stopping = replace(stopping, max_new_tokens=most, min_new_tokens=min(most, stopping.min_new_tokens))
        request = replace(request, stopping=stopping)
        check_capacity(request, self.limits)
        return request

    def _checked(self, given: Sequence[int], least: int, field: str) -> tuple[int, ...]:
        """The length first, so that a huge list is never copied."""
        if len(given) < least:
            raise _invalid(field, f"{len(given)} tokens; give at least {least}")
        if len(given) > self.limits.max_context:
            raise DoesNotFit.of(field, f"{len(given)} tokens are too long: {self._room()}; shorten it")
        if len(given) > self.limits.kv_capacity_tokens + 1:
            raise DoesNotFit.of(field, f"{len(given)} tokens never fit: {self._room()}; give the server more cache")
        ids = tuple(given)
        problem = token_ids(ids, self.limits.vocab_size, len(ids))
        if problem is not None:
            raise _invalid(field, problem)
        return ids

    def _room(self) -> str:
        limits = self.limits
        return f"the context is {limits.max_context} tokens, the key/value cache holds {limits.kv_capacity_tokens}"

    def _banned(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Each word as it stands and after a space: most vocabularies hold both."""
        spelled = (spelling for word in words for spelling in (word, " " + word.lstrip()))
        found = (self._known(self.encode(spelling, whole=False), "sampling.bad_words") for spelling in spelled)
        return tuple(dict.fromkeys(ids for ids in found if ids))


def guides_of(codec: TextCodec | None, limits: Callable[[], ModelLimits]) -> Guides:
    """Grammars over the tokens of a model, whose limits are known by the time that one comes."""
    return Guides(lambda: None if codec is None else codec.table(limits().vocab_size, limits().eos_token_ids))


def _invalid(field: str, rule: str) -> InvalidRequest:
    return InvalidRequest.of([Violation(field, rule)])
