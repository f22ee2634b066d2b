"""langchain's ChatOpenAI: one answer and one stream."""

# mypy: ignore-errors

from __future__ import annotations

import sys
from importlib.metadata import version

import openai
from langchain_openai import ChatOpenAI

base = f"{sys.argv[1]}/v1"
model = openai.OpenAI(base_url=base, api_key="EMPTY").models.list().data[0].id
chat = ChatOpenAI(base_url=base, api_key="EMPTY", model=model, max_tokens=12, seed=3, temperature=0.5)
whole = chat.invoke("What is the city but the people?")
assert whole.content and whole.usage_metadata["output_tokens"] == 12, whole
pieces = [piece.content for piece in chat.stream("What is the city but the people?")]
assert "".join(pieces) == whole.content, (pieces, whole.content)
name = f"langchain-openai {version('langchain-openai')}"
print(f"{name}: an answer of 12 tokens, and the same text in {len(pieces)} pieces")
