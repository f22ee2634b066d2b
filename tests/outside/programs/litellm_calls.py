"""litellm: one answer and one stream, as vLLM's server and as OpenAI's completions."""

# mypy: ignore-errors

from __future__ import annotations

import json
import os
import sys
import urllib.request
from importlib.metadata import version

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # its price list is not asked for on the net
import litellm

base = f"{sys.argv[1]}/v1"
model = json.load(urllib.request.urlopen(f"{base}/models"))["data"][0]["id"]
more = {"api_base": base, "api_key": "EMPTY", "max_tokens": 12, "seed": 3, "temperature": 0.5}
ask = {"messages": [{"role": "user", "content": "Hear me speak."}], "model": f"hosted_vllm/{model}", **more}
whole = litellm.completion(**ask).choices[0].message.content
pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**ask, stream=True)]
assert whole and "".join(pieces) == whole, (pieces, whole)
text = litellm.text_completion(model=f"text-completion-openai/{model}", prompt="Hear me", **more).choices[0].text
assert text
print(f"litellm {version('litellm')}: an answer, the same text as a stream, a completion")
