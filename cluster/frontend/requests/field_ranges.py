"""What every field of a request may be: one row for each number, list and text of the protocol's request messages.

The server checks a message against it before anything else is done (cluster.rpc.codec.range_check); rules that need the
model, or several fields at once, are in parameter_rules.py and train_requests.py and take their numbers from here.
docs/limits.md is printed from it (python -m cluster.rpc.limits_page). A new field of the protocol needs a row, or a
test fails.

Every bound is finite, so that no product of two of them leaves float32 or float64, and wide enough for what the
field's other servers and trainers accept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

Bound = float | str
"""A number, or the name of the setting of FrontendConfig that holds it."""
LONGEST_LIST = 1 << 20
LONGEST_TEXT = 1 << 26
"""Of prompts: no model's context holds as much; what this model's does is checked for each prompt alone."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """Of a number: `low` to `high`, both included, or one of `also`. Of a text its characters, of a list
    also its entries.
    """

    low: Bound = 0
    high: Bound
    also: tuple[float, ...] = ()
    entries: tuple[Bound, Bound] | None = None  # of a list or map
    keys: Range | None = None  # of a map; the rest is then about its values
    unit: str = ""  # "characters" of a text
    why: str = ""

    def within(self, settings: Mapping[str, float]) -> Range:
        """With every bound a number."""
        entries = self.entries
        return replace(
            self, low=_number(self.low, settings), high=_number(self.high, settings),
            entries=None if entries is None else (_number(entries[0], settings), _number(entries[1], settings)),
            keys=None if self.keys is None else self.keys.within(settings),
        )  # fmt: skip

    @property
    def wanted(self) -> str:
        """What to give instead."""
        others = "".join(f"{value:g}, or " for value in self.also)
        return f"{others}{shown(self.low)} to {shown(self.high)}{f' {self.unit}' if self.unit else ''}"

    @property
    def wanted_entries(self) -> str:
        least, most = self.entries or (0, 0)
        return f"{shown(least)} to {shown(most)} entries" if least else f"at most {shown(most)} entries"

    def problem(self, value: float) -> str | None:
        """What is wrong with a number; None where it is allowed. NaN is in no range."""
        low, high = self.low, self.high
        assert not isinstance(low, str) and not isinstance(high, str), "of a range whose settings are known"
        if low <= value <= high or value in self.also:
            return None
        return f"{value!r} is not allowed; give {self.wanted}"

    def problem_at(self, values: Sequence[float]) -> tuple[int, str] | None:
        """The first number of a list that is not allowed. Three passes in C where all are."""
        low, high = self.low, self.high
        assert not isinstance(low, str) and not isinstance(high, str), "of a range whose settings are known"
        if not values or (low <= min(values) and max(values) <= high and not math.isnan(sum(values))):
            return None
        problems = ((place, self.problem(value)) for place, value in enumerate(values))
        return next(((place, problem) for place, problem in problems if problem), None)


def _number(bound: Bound, settings: Mapping[str, float]) -> float:
    return settings[bound] if isinstance(bound, str) else bound


def shown(bound: Bound) -> str:
    """A bound as people read it."""
    if isinstance(bound, str):
        return f"`{bound}`"
    power = math.log2(bound + 1) if isinstance(bound, int) and bound > 1 << 30 else 0.5
    return f"2^{power:.0f} - 1" if power == int(power) and 2 ** int(power) - 1 == bound else f"{bound:.12g}"


def number(low: Bound, high: Bound, why: str = "") -> Range:
    return Range(low=low, high=high, why=why)


def text(high: Bound, low: Bound = 0, why: str = "") -> Range:
    return Range(low=low, high=high, unit="characters", why=why)


def many(each: Range, most: Bound, least: Bound = 0) -> Range:
    """A list of such values."""
    return replace(each, entries=(least, most))


ANY_UINT32, ANY_INT63, ANY_UINT64 = number(0, 2**32 - 1), number(0, 2**63 - 1), number(0, 2**64 - 1)
TOKEN = replace(ANY_UINT32, why="a token id of the model, which is looked at next")
PROMPT_TOKEN = replace(TOKEN, why="token ids of the model, at most its context; looked at for each prompt alone")
PROMPT_TEXT = text(
    LONGEST_TEXT, why="at most `max_chars_per_token` for each token of the context, for each prompt alone"
)
TEMPERATURE = number(1e-4, 1e4, "colder than 0.0001 is greedy, hotter than 10000 is uniform, in float32")
PRIORITY = number(-1_000_000, 1_000_000, "lower goes first")
KEY = text("max_request_id", why="one per call")
GRAMMAR = text("max_guide_length", low=1, why="compiled within llguidance's own limits")
STATE_NAME = text(100, low=1, why="A-Z a-z 0-9 . _ -, beginning with a letter or a digit")
PROMPTS = Range(high=0, entries=(1, "max_prompts_per_call"))
PENALTY = number(-100, 100, "OpenAI takes -2 to 2")
LOGPROB = number(-1e4, 10, "of one token, in nats; a little above 0 where it was rounded")
SEQUENCES = Range(high=0, entries=(1, "max_train_tokens"), why="and at most `max_train_tokens` tokens together")
POSITIVE_SUM = number(1e-6, 1e12, "a sum of weights, or a count: what the loss is divided by")
WEIGHT = number(0, 1e4, "a share of the loss")
SESSION = text("max_request_id", why="whose gradients are meant, among the caller's own")
CALLER = text(4096, why="as GetTrainState names it")
STAND = ("expected_step", "expected_incarnation")
PASS: Mapping[str, Range] = {
    "sequences": SEQUENCES, "loss": text(64), "expected_step": ANY_INT63, "normaliser": POSITIVE_SUM,
    "idempotency_key": KEY, "dropout_seed": ANY_UINT64, "session": SESSION, "expected_incarnation": ANY_INT63,
}  # fmt: skip
NAMED: Mapping[str, Range] = {
    "name": STATE_NAME, "expected_step": ANY_INT63, "idempotency_key": KEY, "expected_incarnation": ANY_INT63,
}  # fmt: skip

FIELDS: Mapping[str, Mapping[str, Range]] = {
    "GenerateRequest": {
        "request_id": KEY,
        "prompts": PROMPTS,
        "priority": PRIORITY,
        "adapter": text(256, why="answered UNIMPLEMENTED"),
    },
    "Prompt": {"text": PROMPT_TEXT},
    "TokenIds": {"ids": many(PROMPT_TOKEN, LONGEST_LIST)},
    "FillInMiddle": {"prefix": PROMPT_TEXT, "suffix": PROMPT_TEXT},
    "SamplingParams": {
        "temperature": replace(TEMPERATURE, also=(0.0,)),
        "top_k": number(1, 2**32 - 1, "left out: no cut; more than the vocabulary is no cut"),
        "top_p": number(1e-9, 1, "left out: no cut"),
        "min_p": number(0, 1),
        "seed": ANY_INT63,
        "n": number(1, "max_n"),
        "repetition_penalty": number(0.01, 100, "1: none; transformers and vLLM take any above 0"),
        "presence_penalty": PENALTY,
        "frequency_penalty": PENALTY,
        "logit_bias": Range(low=-1e4, high=1e4, entries=(0, "max_id_list"), keys=TOKEN, why="OpenAI takes -100 to 100"),
        "allowed_token_ids": many(TOKEN, "max_id_list"),
        "bad_words": many(text("max_stop_length", low=1), "max_bad_words"),
        "bad_word_ids": Range(high=0, entries=(0, "max_bad_words"), why="each 1 to `max_stop_length` token ids"),
        "no_repeat_ngram_size": number(0, 65536, "0: no rule; longer than the context means nothing"),
        "best_of": number(1, "max_n", "and at least n"),
    },
    "StructuredOutputs": dict.fromkeys(("json", "regex", "grammar"), GRAMMAR),
    "Choice": {"texts": many(GRAMMAR, "max_id_list", least=1)},
    "Beam": {
        "width": number(2, 256, "and at most engine.max_sequences; without beams leave `beam` out"),
        "length_penalty": number(-20, 20, "length ^ 20 is finite for every context"),
        "groups": number(0, 256, "0 and 1: none; else a divisor of width"),
        "diversity_penalty": number(0, 1e6),
    },
    "StoppingCriteria": {
        "max_new_tokens": number(1, 2**32 - 1, "what does not fit the context is cut"),
        "min_new_tokens": number(0, 2**32 - 1, "and at most max_new_tokens, or the context"),
        "stop_sequences": many(text("max_stop_length", low=1), "max_stop_sequences"),
        "stop_token_ids": many(TOKEN, "max_id_list"),
    },
    "ResponseOptions": {
        "logprobs": number(0, "max_logprobs"),
        "prompt_logprobs": number(0, "max_logprobs"),
        "logprobs_temperature": TEMPERATURE,
    },
    "ScoreRequest": {
        "sequences": PROMPTS,
        "temperature": TEMPERATURE,
        "request_id": KEY,
        "priority": PRIORITY,
        "top_logprobs": number(0, "max_logprobs"),
        "adapter": text(256, why="answered UNIMPLEMENTED"),
    },
    "ClassifyRequest": {
        "sequences": PROMPTS,
        "request_id": KEY,
        "priority": PRIORITY,
        "num_choices": number(0, "max_prompts_per_call", "0: all; else a divisor of the number of sequences"),
        "marks": many(number(0, LONGEST_LIST, "a place in its sequence"), "max_prompts_per_call"),
        "num_spans": number(1, 100),
        "max_answer_tokens": number(1, 1000, "transformers' question answering takes 15"),
    },
    "EmbedRequest": {"sequences": PROMPTS, "request_id": KEY, "priority": PRIORITY},
    "TokenizeRequest": {"texts": many(PROMPT_TEXT, "max_prompts_per_call", least=1)},
    "DetokenizeRequest": {"sequences": PROMPTS},
    "AbortRequest": {"request_ids": many(KEY, "max_open_requests")},
    "DrainRequest": {"grace_seconds": number(0, 86400, "a day")},
    "RestartRequest": {"grace_seconds": number(0, 86400, "a day")},
    "TrainSequence": {
        "token_ids": many(PROMPT_TOKEN, LONGEST_LIST),
        "loss_weights": many(number(0, 1e6, "weights are compared with 1, the default"), LONGEST_LIST),
        "old_logprobs": many(LOGPROB, LONGEST_LIST),
        "advantages": many(number(-1e6, 1e6, "usually normalised to a few units"), LONGEST_LIST),
        "reference_logprobs": many(LOGPROB, LONGEST_LIST),
        "labels": many(number(-100, 2**31 - 1, "-100: nothing is learned"), LONGEST_LIST),
        "values": many(number(-1e9, 1e9, "its square is finite in float32"), LONGEST_LIST),
        "mark": number(0, LONGEST_LIST, "a place in the sequence"),
    },
    "LossOptions": {
        "clip_low": number(0, 1, "a ratio is never below 0, so 1 is no lower clip"),
        "clip_high": number(0, 1e4, "0.1 to 0.3 are usual; a ratio above 10001 is noise"),
        "beta": number(1e-6, 1e3, "0.01 to 0.5 are usual"),
        "label_smoothing": number(0, 0.49, "at 0.5 both answers are wanted alike"),
        "num_choices": number(0, 65536, "0: all sequences are one question"),
        "questions": number(1e-3, 1e9, "a count: what the choices' loss is divided by"),
        "language_weight": WEIGHT,
        "choice_weight": WEIGHT,
    },
    "OptimizerOptions": {
        "learning_rate": number(0, 10, "AdamW moves a weight by about as much in each step; 1e-6 to 1e-2 are usual"),
        "beta1": number(0, 0.999999),
        "beta2": number(0, 0.999999),
        "epsilon": number(1e-20, 1, "below that a gradient of 0 is divided by 0 in float32"),
        "weight_decay": number(0, 10, "0.01 to 0.1 are usual"),
        "max_grad_norm": number(0, 1e12, "a huge one clips nothing"),
    },
    "TrainStepRequest": PASS,
    "ForwardBackwardRequest": PASS,
    "EvaluateRequest": {
        name: row for name, row in PASS.items() if name not in ("idempotency_key", "dropout_seed", "session")
    },
    "OptimStepRequest": {name: row for name, row in PASS.items() if name in (*STAND, "idempotency_key", "session")},
    "DropGradientsRequest": {"caller": CALLER, "session": SESSION},
    "SaveStateRequest": NAMED,
    "LoadStateRequest": NAMED,
    "ExportRequest": NAMED,
}
"""By message and field."""
