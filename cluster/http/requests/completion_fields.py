"""Bodies to what they ask for: /v1/completions, /v1/chat/completions, /v1/embeddings. Total: a body becomes a call, or
the error that names the field.
"""

from __future__ import annotations

from typing import Any

from cluster.engine.request import Pooling, ResponseOptions
from cluster.frontend.requests.call import Call, FillInMiddle, FrontendConfig, Prompt
from cluster.frontend.requests.classify_embed import Reading
from cluster.http.requests.asked import IGNORED, Asked, check_refused, sampling_of, stopping_of, streaming_of
from cluster.http.requests.chat_template import ChatTemplate
from cluster.http.requests.json_body import Fields, invalid, is_ids

COMPLETION_TOKENS = 16
"""Of an answer where nobody says, as OpenAI has it."""
NO_TEMPLATE = (
    "this checkpoint has no chat template, as base models do not; use /v1/completions, or have the server started with "
    "--chat-template FILE"
)
CHAT_TOP = 20


def completion(fields: Fields, request_id: str, config: FrontendConfig) -> Asked:
    """What a body of /v1/completions asks for."""
    check_refused(fields)
    streaming = streaming_of(fields)
    echo, logprobs = fields.flag("echo"), _logprobs(fields)
    prompt_logprobs, token_ids = fields.whole("prompt_logprobs", None), fields.flag("return_token_ids")
    most = fields.whole("max_tokens", COMPLETION_TOKENS)
    if streaming is not None and ((echo and logprobs is not None) or prompt_logprobs is not None):
        raise invalid("stream", "log-probabilities of the prompt are not streamed; leave stream out")
    score = most == 0 and echo
    above = logprobs if echo else prompt_logprobs
    whole = fields.flag("add_special_tokens", True)
    prompts = _prompts(fields, config)
    first = token_ids or prompt_logprobs is not None or not whole
    asked = Asked(
        call=Call(
            prompts=prompts,
            request_id=request_id or fields.text("request_id", ""),
            sampling=sampling_of(fields),
            stopping=stopping_of(fields, None if score else most),
            response=ResponseOptions(
                logprobs=None if score else logprobs,
                prompt_logprobs=(above or 0) if score else above,
                echo=echo,
            ),
            bad_words=fields.texts("bad_words"),
            priority=fields.whole("priority", 0),
            score=score,
        ),
        model=fields.text("model", None),
        streaming=streaming,
        echo=echo,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        token_ids=token_ids,
        names_are_ids=fields.flag("return_tokens_as_token_ids"),
        texts=tuple(prompt.text for prompt in prompts) if first else (),
        whole_texts=whole,
    )
    if asked.call.sampling.beam is not None and streaming is not None:
        raise invalid("stream", "a beam search is known at its end only; leave stream out")
    fields.ignore(IGNORED | {"logit_bias"})
    return asked


def chat(fields: Fields, request_id: str) -> Asked:
    """What a body of /v1/chat/completions asks for, its prompt aside (`chat_text`)."""
    check_refused(fields)
    streaming = streaming_of(fields)
    top = fields.whole("top_logprobs", None)
    asks = fields.flag("logprobs")
    if top is not None and not asks:
        raise invalid("top_logprobs", "is only for logprobs: true; add it")
    if top is not None and not 0 <= top <= CHAT_TOP:
        raise invalid("top_logprobs", f"is {top}; give 0 to {CHAT_TOP}")
    most, older = fields.whole("max_completion_tokens", None), fields.whole("max_tokens", None)
    logprobs = (top or 0) if asks else None
    return Asked(
        call=Call(
            prompts=(),
            request_id=request_id or fields.text("request_id", ""),
            sampling=sampling_of(fields),
            stopping=stopping_of(fields, older if most is None else most),
            response=ResponseOptions(logprobs=logprobs),
            bad_words=fields.texts("bad_words"),
            priority=fields.whole("priority", 0),
        ),
        model=fields.text("model", None),
        streaming=streaming,
        logprobs=logprobs,
        token_ids=fields.flag("return_token_ids"),
        names_are_ids=fields.flag("return_tokens_as_token_ids"),
        whole_texts=fields.flag("add_special_tokens"),
    )


def chat_text(fields: Fields, template: ChatTemplate | None) -> str:
    """The conversation of a body as one text."""
    if template is None:
        raise invalid("messages", NO_TEMPLATE)
    more = fields.section("chat_template_kwargs").all()
    if "messages" in more or "add_generation_prompt" in more:
        raise invalid("chat_template_kwargs", "holds a name that is the template's own; give it beside them")
    go_on = fields.flag("continue_final_message")
    if go_on:
        raise invalid("continue_final_message", "is not served; leave it out")
    generate = fields.flag("add_generation_prompt", True)
    return template.render(messages_of(fields.any("messages")), generate, more)


def messages_of(given: Any) -> list[dict[str, Any]]:
    """Each with a role; content that comes in parts of text is put together."""
    if not isinstance(given, list) or not given:
        raise invalid("messages", "none given; give a list of at least one")
    return [_message(one, f"messages[{index}]") for index, one in enumerate(given)]


def embedding(fields: Fields, request_id: str, config: FrontendConfig) -> Call:
    """What a body of /v1/embeddings asks for: of each input the last state, of length 1."""
    return Call(
        prompts=_prompts(fields, config, "input"),
        request_id=request_id,
        priority=fields.whole("priority", 0),
        reading=Reading(pooling=Pooling(rows="last", head=False, normalize=fields.flag("normalize", True))),
    )


def _message(given: Any, field: str) -> dict[str, Any]:
    if not isinstance(given, dict) or not isinstance(given.get("role"), str):
        raise invalid(field, "is no object with a role; give {role, content}")
    content = given.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, field) for part in content)
    if not isinstance(content, str | None):
        raise invalid(f"{field}.content", "is no text; give text, or a list of parts of type text")
    return {**given, "content": content}


def _part(part: Any, field: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise invalid(f"{field}.content", "holds a part that is no text; this server reads text only")


def _logprobs(fields: Fields) -> int | None:
    """A number; what chat clients send here (true) is refused with the number to give."""
    value = fields.any("logprobs")
    if isinstance(value, bool):
        if not value:
            return None
        raise invalid("logprobs", "is true, which is for chat; give how many alternatives, as in 0 or 5")
    return fields.whole("logprobs", None)


def _prompts(fields: Fields, config: FrontendConfig, name: str = "prompt") -> tuple[Prompt, ...]:
    """The four forms: a text, texts, token ids, lists of token ids."""
    given, suffix = fields.any(name), fields.text("suffix", None)
    one = isinstance(given, str) or (is_ids(given) and given)
    items = [given] if one else given
    if not isinstance(items, list) or not items:
        raise invalid(name, "none given; give a text, a list of texts, token ids or a list of lists of them")
    if len(items) > config.max_prompts_per_call:
        raise invalid(name, f"{len(items)} entries; at most {config.max_prompts_per_call} are allowed")
    return tuple(_prompt(item, suffix, f"{name}[{index}]") for index, item in enumerate(items))


def _prompt(item: Any, suffix: str | None, field: str) -> Prompt:
    if isinstance(item, str):
        return Prompt(text=item) if suffix is None else Prompt(fim=FillInMiddle(item, suffix))
    if not is_ids(item):
        raise invalid(field, "is neither text nor a list of token ids")
    if suffix is not None:
        raise invalid("suffix", "goes with a text, not with token ids; send the marks among the ids")
    return Prompt(token_ids=item)
