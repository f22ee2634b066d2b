"""Conversations as one text, by a checkpoint's Jinja template, in the sandbox and with the names that transformers
gives such templates. What a template says is the model's; that it says nothing but text is the sandbox's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cluster.http.requests.json_body import invalid
from parallel.errors import ConfigError

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
JINJA_FILE, JSON_FILE = "chat_template.jinja", "chat_template.json"


class ChatTemplate:
    """A compiled template."""

    def __init__(self, source: str, config: Mapping[str, Any], where: str) -> None:
        """`config`: tokenizer_config.json's; `where` the template is from, for errors."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the chat template of {where} is no Jinja template: {error}") from error
        self._tokens = {name: text for name in SPECIAL if (text := token_text(config.get(name))) is not None}

    def render(self, messages: Sequence[Mapping[str, Any]], generate: bool, more: Mapping[str, Any]) -> str:
        """The text of a conversation; InvalidRequest where the template refuses it."""
        values = {**self._tokens, **more, "messages": messages, "add_generation_prompt": generate}
        try:
            return self._template.render(values)
        except Exception as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise invalid("messages", f"the chat template refuses them: {reason}") from error


def template_of(folder: Path, config: Mapping[str, Any], file: Path | None = None) -> ChatTemplate | None:
    """That of a file, else the checkpoint's own: chat_template.jinja, chat_template.json, tokenizer_config.json."""
    for path in (file, folder / JINJA_FILE) if file else (folder / JINJA_FILE,):
        if path == file or path.is_file():
            return ChatTemplate(_read(path), config, str(path))
    source = config.get("chat_template")
    if (folder / JSON_FILE).is_file():
        source = json.loads(_read(folder / JSON_FILE)).get("chat_template", source)
    if isinstance(source, list):  # several, by name
        source = next((one.get("template") for one in source if one.get("name") == "default"), None)
    return ChatTemplate(source, config, str(folder)) if isinstance(source, str) else None


def check_template(file: Path) -> None:
    """Refuses a file that is no template, before a model is loaded for it."""
    ChatTemplate(_read(file), {}, str(file))


def token_text(token: object) -> str | None:
    """A special token as tokenizer_config.json writes it: its text, or an object that holds it."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the chat template {path} cannot be read: {error}") from error


def _tojson(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
