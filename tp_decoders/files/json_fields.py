"""Reading a JSON object that others wrote: what is known is checked, what is not known is named and left alone.

A family reads its options one by one (`integer`, `number`, `flag`, `choice`, `only`), each with the default that
transformers gives a missing key; `finish` notes the keys nobody asked for, which transformers does not read either, and
refuses those that would make it another model. Nothing is coerced, save that 12.0 is an integer: "12" is not a number,
1 is not a flag, and no number is infinite. Sizes are bounded here, before anything is made of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isfinite
from typing import Any

from parallel.errors import ConfigError

BOOKKEEPING = frozenset(
    """
    architectures auto_map dtype torch_dtype transformers_version model_type task_specific_params
    finetuning_task id2label label2id num_labels _num_labels problem_type tokenizer_class prefix tokenizer_name
    name_or_path _name_or_path _commit_hash _attn_implementation attn_implementation _experts_implementation
    _attn_implementation_autoset _attn_implementation_internal _experts_implementation_internal experts_implementation
    attn_impl return_dict output_attentions _output_attentions output_hidden_states tie_last_hidden_states torchscript
    use_bfloat16 tf_legacy_loss use_cache gradient_checkpointing chunk_size_feed_forward output_past
    is_decoder base_model_tp_plan base_model_pp_plan custom_pipelines custom_pipeline
    xla_device keys_to_ignore_at_inference
    """.split()  # noqa: SIM905
)
"""What transformers writes about itself, its heads or its running: it does not change a causal model's numbers."""

GENERATION = frozenset(
    """
    bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id decoder_start_token_id
    max_length min_length max_new_tokens min_new_tokens do_sample early_stopping max_time stop_strings num_beams
    num_beam_groups penalty_alpha diversity_penalty temperature top_k top_p min_p top_h typical_p epsilon_cutoff
    eta_cutoff repetition_penalty encoder_repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids force_words_ids renormalize_logits constraints num_return_sequences
    output_scores output_logits return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens forced_decoder_ids sequence_bias
    token_healing guidance_scale low_memory watermarking_config cache_implementation cache_config
    return_legacy_cache dola_layers use_cache
    """.split()  # noqa: SIM905
)
"""Defaults of generation, which requests state for themselves."""

TASK_HEADS = frozenset({"classifier_dropout", "hidden_dropout", "summary_last_dropout"})
"""What only a task's head reads (tp_decoders.tasks.task_settings), in families whose decoder has no use for it."""

ANOTHER_MODEL: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "tie_encoder_decoder": (False, None),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": (None, {}, []),
    "quantization_config": (None, {}),
    "compression_config": (None, {}),
    "per_layer_config": (None, {}, []),
}
"""Options of any config that would make it another model: accepted at these values only, save by the families that ask
for one.
"""

MOST = 2**24
"""No integer of a config is larger: far above any model's, far below what a machine trips over."""
MOST_LAYERS = 10_000
MOST_RATIO = 1024.0

REQUIRED: Any = object()


def shown(value: Any, most: int = 120) -> str:
    """A value as a message quotes it: in one line, cut where it is long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


class Fields:
    """A JSON object being read; remembers which keys have been asked for, and in `unread` which nobody asked for."""

    def __init__(self, values: Mapping[str, Any], where: str, within: Fields | None = None) -> None:
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where} should be a JSON object, not {shown(values)}")
        self.values = values
        self.where = where
        self.seen: set[str] = set()
        self.unread: list[str] = [] if within is None else within.unread
        self.remarks: list[str] = [] if within is None else within.remarks
        self._prefix = "" if within is None else where.removeprefix(f"{within.where}: ") + "."

    def take(self, key: str, default: Any = REQUIRED, aliases: tuple[str, ...] = ()) -> Any:
        """The raw value under any of its names; two names may not disagree, null beside another value aside."""
        self.seen.update((key, *aliases))
        found = {name: self.values[name] for name in (key, *aliases) if name in self.values}
        found = {name: value for name, value in found.items() if value is not None} or found
        if not found:
            if default is REQUIRED:
                raise ConfigError(f"{self.where} has no {key!r}, which says the model's shape; add it")
            return default
        values = list(found.values())
        if any(value != values[0] for value in values[1:]):
            raise ConfigError(f"{self.where}: {shown(found)} are names of one option and disagree; keep one of them")
        return values[0]

    def refuse(self, key: str, accepted: str, value: Any = REQUIRED) -> ConfigError:
        value = self.values.get(key) if value is REQUIRED else value
        return ConfigError(f"{self.where}: {key} = {shown(value)} is not supported; accepted: {accepted}")

    def integer(
        self, key: str, default: Any = REQUIRED, *, least: int = 1, most: int = MOST, aliases: tuple[str, ...] = ()
    ) -> int:
        value = self.take(key, default, aliases)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.refuse(key, f"an integer of at least {least}", value)
        if value > most:
            raise self.refuse(key, f"an integer of at most {most}", value)
        return value

    def optional_integer(self, key: str, *, most: int = MOST) -> int | None:
        return None if self.take(key, None) is None else self.integer(key, most=most)

    def number(
        self,
        key: str,
        default: Any = REQUIRED,
        *,
        above: float | None = None,
        within: tuple[float, float] | None = None,
        aliases: tuple[str, ...] = (),
    ) -> float:
        value = self.take(key, default, aliases)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_finite(value):
            raise self.refuse(key, "a number", value)
        if above is not None and value <= above:
            raise self.refuse(key, f"a number above {above}", value)
        if within is not None and not within[0] <= value <= within[1]:
            raise self.refuse(key, f"a number from {within[0]} to {within[1]}", value)
        return float(value)

    def optional_number(
        self, key: str, *, above: float | None = None, within: tuple[float, float] | None = None
    ) -> float | None:
        return None if self.take(key, None) is None else self.number(key, above=above, within=within)

    def flag(self, key: str, default: bool) -> bool:
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, "true or false")
        return value

    def choice(self, key: str, default: str, accepted: Iterable[str]) -> str:
        value = self.take(key, default)
        if not isinstance(value, str) or value not in accepted:
            raise self.refuse(key, ", ".join(sorted(accepted)))
        return value

    def only(self, key: str, *accepted: Any) -> None:
        """An option that is understood, and refused at any other value."""
        if key in self.values and self.take(key) not in accepted:
            raise self.refuse(key, " or ".join(map(repr, accepted)))
        self.seen.add(key)

    def section(self, key: str) -> Fields | None:
        """A nested object, to be read the same way; None where it is absent or null."""
        value = self.take(key, None)
        return None if value is None else Fields(value, f"{self.where}: {key}", self)

    def finish(self, harmless: Iterable[str] = ()) -> None:
        """Refuses what makes it another model, and notes every other key that was neither asked for nor harmless."""
        for key, accepted in ANOTHER_MODEL.items():
            if key not in self.seen:
                self.only(key, *accepted)
        unread = set(self.values) - self.seen - BOOKKEEPING - GENERATION - TASK_HEADS - set(harmless)
        self.unread.extend(f"{self._prefix}{key if key.isidentifier() else shown(key, 60)}" for key in sorted(unread))

    def warnings(self) -> list[str]:
        """What whoever reads the object should be told, a line each: first the keys that were left alone."""
        if not self.unread:
            return self.remarks
        keys = sorted(self.unread)
        named = ", ".join(keys[:40]) + (f" and {len(keys) - 40} more" if len(keys) > 40 else "")
        unread = f"{self.where}: {named}: not read, since no part of the model is known to depend on them"
        return [unread, *self.remarks]


def _is_finite(value: float) -> bool:
    """Whether it is a number that a float can hold."""
    try:
        return isfinite(value)
    except OverflowError:
        return False
