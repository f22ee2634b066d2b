"""The interface as an OpenAPI document: openapi.yaml with the version, and the name of the model in its path."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

import yaml

MODEL_PATH = "/v1/models/MODEL"
SHARED = {"CompletionRequest": "Sampling", "ChatRequest": "Sampling"}
"""Requests, and the schema whose properties they have beside their own."""


def document(paths: Collection[str], model: str, version: str) -> dict[str, Any]:
    """What is answered at these paths; of a model that is called `model`."""
    whole = _written()
    schemas = dict(whole["components"]["schemas"])
    for name, shared in SHARED.items():
        schemas[name] = {
            **schemas[name],
            "properties": {**schemas[shared]["properties"], **schemas[name]["properties"]},
        }
    found = {path.replace(MODEL_PATH, f"/v1/models/{model}"): item for path, item in whole["paths"].items()}
    return {
        **whole,
        "info": {**whole["info"], "version": version},
        "paths": {path: item for path, item in found.items() if path in paths},
        "components": {**whole["components"], "schemas": schemas},
    }


@cache
def _written() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("openapi.yaml").read_text(encoding="utf-8"))
    return loaded
