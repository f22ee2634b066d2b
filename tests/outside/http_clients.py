"""OpenAI's own client and lm-eval against a running server, unmodified: run it in an environment that has them.

    python -m venv outside && outside/bin/pip install openai 'lm-eval[api]'
    tp-decoders serve --model DIR --chat-template FILE        # a checkpoint with a tokenizer
    outside/bin/python tests/outside/http_clients.py http://127.0.0.1:8000

Prints what it saw, and ends with an error where that is not what it must be. docs/outside-http.txt is its output. Uses
nothing of this project.
"""

# mypy: ignore-errors

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import openai

TASK = """task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/letters.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


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
    _lm_eval(base, model)


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
    body = {"model": model, "messages": [{"role": "user", "content": "A city:"}], "max_completion_tokens": 150}
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


def _lm_eval(base: str, model: str) -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        rows = [{"question": f"{a}, then", "choices": [" one", " two", " three"], "answer": a % 3} for a in range(20)]
        (folder / "letters.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (folder / "letters.yaml").write_text(TASK.format(folder=folder))
        more = "tokenizer_backend=remote,num_concurrent=4,max_length=256"
        arguments = f"base_url={base}/v1/completions,model={model},{more}"
        command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", arguments,
                   "--tasks", "letters", "--include_path", made, "--output_path", made, "--log_samples"]  # fmt: skip
        ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        assert ran.returncode == 0, ran.stdout + ran.stderr
        print(f"lm-eval {version('lm-eval')}")
        print("\n".join(line for line in ran.stdout.splitlines() if line.startswith("|")))
        (samples,) = folder.rglob("samples_*.jsonl")
        found = map(json.loads, samples.read_text().splitlines())
        scores = [float(one[0]) for sample in found for one in sample["filtered_resps"]]
        print("log-likelihoods:", len(scores), "of the first question", scores[:3])


if __name__ == "__main__":
    main(sys.argv[1])
