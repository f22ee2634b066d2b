"""A guide in the words of llguidance, and what is wrong with one as far as that needs no vocabulary."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from cluster.engine.request import Guide, ModelLimits, SamplingParams, StoppingCriteria
from cluster.request_errors import NoGuides

if TYPE_CHECKING:
    import llguidance

MISSING = (
    "this server cannot follow a grammar: the package llguidance is not installed beside it; install it with "
    "pip install 'tp-decoders[guided]' and start the server again, or leave structured_outputs out"
)
ANY_OBJECT = '{"type": "object"}'
BLANKS = r"[\x20\x0A\x0D\x09]{1,32}"
"""Between two parts of JSON. A bound, since a weak model may write blanks to the end of its tokens."""


def library() -> type[llguidance.LLMatcher]:
    """llguidance's matcher. Raises NoGuides where the package is missing."""
    try:
        from llguidance import LLMatcher
    except ImportError as error:
        raise NoGuides(MISSING) from error
    return LLMatcher


def choice_guide(texts: Iterable[str]) -> Guide:
    """One of these texts."""
    return Guide(kind="choice", text=json.dumps([*texts], ensure_ascii=False))


def grammar_text(guide: Guide) -> str:
    """As llguidance reads it. ValueError where the text is no JSON."""
    matcher = library()
    if guide.kind == "regex":
        return matcher.grammar_from_regex(guide.text)
    if guide.kind == "grammar":
        return matcher.grammar_from_lark(guide.text)
    if guide.kind == "choice":
        return matcher.grammar_from_regex("|".join(map(_literal, json.loads(guide.text))))
    blanks = {"whitespace_pattern": BLANKS} if guide.any_whitespace else {"whitespace_flexible": False}
    schema = guide.text if guide.kind == "json" else ANY_OBJECT
    return matcher.grammar_from_json_schema(schema, None, blanks)  # type: ignore[arg-type]


def _literal(text: str) -> str:
    """A regular expression of this text alone."""
    return re.sub(r"[^0-9A-Za-z\u0080-\U0010ffff]", lambda found: f"\\x{ord(found[0]):02x}", text)


def guide_problems(
    sampling: SamplingParams, stopping: StoppingCriteria, limits: ModelLimits
) -> Iterator[tuple[str, str]]:
    """What does not go with a guide, as (field, problem)."""
    if sampling.guide is None:
        return
    if sampling.beam is not None and not limits.eos_token_ids:
        yield (
            "sampling.beam",
            "is set with structured_outputs, and this model has no token that ends a beam; leave it out",
        )
    if stopping.ignore_eos:
        yield (
            "stopping.ignore_eos",
            "is set with structured_outputs, which ends with the text; leave one of them out",
        )
    if stopping.min_new_tokens:
        yield (
            "stopping.min_new_tokens",
            f"is {stopping.min_new_tokens} with structured_outputs, which may have to end before; ask for the length "
            "in the grammar (minLength, minItems)",
        )
    if sampling.guide.kind == "choice" and not _is_choice(sampling.guide.text):
        yield "sampling.structured_outputs.choice", "is no list of at least one text, none of them empty"


def _is_choice(text: str) -> bool:
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return isinstance(found, list) and bool(found) and all(isinstance(each, str) and each for each in found)
