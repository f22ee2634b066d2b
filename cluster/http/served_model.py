"""What an HTTP server says of its model: names, tokenizer settings, chat template, the fingerprint of its numerics."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cluster.frontend.output.output_text import TextCodec
from cluster.http.requests.chat_template import SPECIAL, ChatTemplate, template_of, token_text
from cluster.rpc.services.control_service import ServiceInfo, software_version
from parallel.errors import ConfigError
from tp_decoders.text.tokenizer_settings import read_json

SETTINGS = "tokenizer_config.json"


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """One model, by the name that requests give."""

    info: ServiceInfo = ServiceInfo()
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    """tokenizer_config.json, with its special tokens as texts."""
    template: ChatTemplate | None = None

    @property
    def name(self) -> str:
        return self.info.model_id

    @property
    def fingerprint(self) -> str:
        """Of what answers depend on beside the weights' version; tensor-parallel size and replicas are no part."""
        info = self.info
        told = [software_version(), info.model_id, info.family, info.dtype, info.device, info.numerics, _grammars()]
        told += [info.quantization] if info.quantization else []
        digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()
        return f"fp_{digest[:12]}"


def _grammars() -> str:
    """The version of what reads grammars, which may change what one allows; empty where it is missing."""
    try:
        return version("llguidance")
    except PackageNotFoundError:
        return ""


def served_model(info: ServiceInfo, folder: Path, eos_ids: tuple[int, ...], codec: TextCodec | None,
                 chat_template: Path | None = None) -> ServedModel:  # fmt: skip
    """What a checkpoint's folder says, and the file of a chat template if another one is wanted."""
    config = read_json(folder / SETTINGS)
    if chat_template is not None and codec is None:
        raise ConfigError(f"{folder} has no tokenizer, so its chats would be no text; leave --chat-template out")
    settings = {**config, **{name: text for name in SPECIAL if (text := token_text(config.get(name))) is not None}}
    settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    if codec is not None and not isinstance(settings.get("eos_token"), str):
        settings["eos_token"] = codec.tokenizer.token_bytes(eos_ids[0]).decode("utf-8", "replace") if eos_ids else ""
    template = template_of(folder, config, chat_template)
    return ServedModel(info=info, tokenizer=settings if codec is not None else {}, template=template)
