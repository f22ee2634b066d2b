"""OpenAI's own client, unmodified, against a running server: `python openai_client.py http://127.0.0.1:8000` in an
environment that has it. Prints what it saw, and ends with an error where that is not what it must be.
"""

# mypy: ignore-errors

from __future__ import annotations

import json
import sys
from importlib.metadata import version

import openai


def main(base: str) -> None:
    client = openai.OpenAI(base_url=f"{base}/v1", api_key="EMPTY")
    print(f"openai {version('openai')}")
    model = client.models.list().data[0].id
    print("models:", model)
    _completions(client, model)
    _chat(client, model)
    _structured(client, model)
    _errors(client, model)
    _embeddings(client, model)


def _completions(client: openai.OpenAI, model: str) -> None:
    body = {"model": model, "prompt": ["The cat", "日本"], "max_tokens": 8, "seed": 4, "n": 2}
    whole = client.completions.create(**body)
    print("completions:", [(c.index, c.finish_reason) for c in whole.choices], whole.usage.to_dict())
    texts = dict.fromkeys(range(4), "")
    for chunk in client.completions.create(**body, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
        last = chunk
    assert texts == {c.index: c.text for c in whole.choices} and last.usage == whole.usage
    assert whole.system_fingerprint == last.system_fingerprint
    print("stream: the same texts, usage and fingerprint")
    stop = whole.choices[0].text[3:5]
    stopped = client.completions.create(**{**body, "stop": [stop]}).choices[0]
    assert stopped.text == whole.choices[0].text.partition(stop)[0] and stopped.finish_reason == "stop"
    print("stop:", stopped.finish_reason)


def _chat(client: openai.OpenAI, model: str) -> None:
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_completion_tokens": 8, "seed": 1}
    whole = client.chat.completions.create(**body, logprobs=True, top_logprobs=2)
    (choice,) = whole.choices
    entry = choice.logprobs.content[0]
    assert entry.token.encode("utf-8", "replace")[:1] == bytes(entry.bytes[:1]) or entry.token.startswith("bytes:")
    print("chat:", choice.message.role, choice.finish_reason, len(choice.logprobs.content), "log-probabilities")
    with client.chat.completions.create(**body, stream=True) as stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == choice.message.content
    print("chat stream: the same text")


def _structured(client: openai.OpenAI, model: str) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "people": {"type": "integer", "maximum": 9999999,
                       "minimum": 0}, "capital": {"type": "boolean"}},
        "required": ["city", "people", "capital"], "additionalProperties": False,
    }  # fmt: skip
    body = {"model": model, "messages": [{"role": "user", "content": "A city:"}], "max_completion_tokens": 180}
    body["frequency_penalty"] = 2  # a weak model else writes blanks, which JSON allows, to the end of its tokens
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}}
    for seed in range(5):
        choice = client.chat.completions.create(**body, seed=seed, response_format=form).choices[0]
        found = json.loads(choice.message.content)
        assert choice.finish_reason == "stop" and set(found) == set(schema["required"]), choice
        assert isinstance(found["city"], str) and isinstance(found["people"], int) and found["capital"] in (True, False)
    with client.chat.completions.create(**body, seed=seed, response_format=form, stream=True) as stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == choice.message.content
    words = {"structured_outputs": {"choice": ["north", "south"]}}
    told = {
        client.completions.create(model=model, prompt="Go", seed=s, extra_body=words).choices[0].text for s in range(9)
    }
    assert told <= {"north", "south"}, told
    try:
        client.chat.completions.create(
            **body, response_format={**form, "json_schema": {"name": "x", "schema": {"type": 5}}}
        )
    except openai.BadRequestError as error:
        print("json_schema: 5 answers and a stream follow it; a wrong one:", error.status_code, error.code)
    else:
        raise AssertionError("a wrong schema was not refused")


def _errors(client: openai.OpenAI, model: str) -> None:
    for wrong in ({"temperature": -1}, {"model": "gpt-4"}, {"prompt": [5] * 100_000}):
        try:
            client.completions.create(**{"model": model, "prompt": "a", **wrong})
        except openai.APIStatusError as error:
            print("error:", type(error).__name__, error.status_code, error.code, error.param)
        else:
            raise AssertionError(f"{wrong} was not refused")


def _embeddings(client: openai.OpenAI, model: str) -> None:
    found = client.embeddings.create(model=model, input=["a", "b"]).data
    print("embeddings:", [len(one.embedding) for one in found])


if __name__ == "__main__":
    main(sys.argv[1])
