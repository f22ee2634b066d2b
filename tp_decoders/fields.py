"""Strict reading of a JSON object: every key is understood, known to be harmless, or an error that names it.

A family reads its options one by one (`integer`, `number`, `flag`, `choice`, `only`), each with the default that
transformers gives a missing key; `finish` then refuses what nobody asked for. Nothing is coerced: "12" is not a
number and 1 is not a flag.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from parallel.errors import ConfigError

BOOKKEEPING = frozenset(
    """
    architectures auto_map dtype torch_dtype transformers_version model_type task_specific_params
    finetuning_task id2label label2id num_labels problem_type tokenizer_class prefix tokenizer_name
    name_or_path _name_or_path _commit_hash _attn_implementation attn_implementation
    _attn_implementation_autoset attn_impl return_dict output_attentions output_hidden_states torchscript
    use_bfloat16 tf_legacy_loss use_cache gradient_checkpointing chunk_size_feed_forward output_past
    is_decoder
    """.split()  # noqa: SIM905
)
"""What transformers writes about itself, its heads or its running: it does not change a causal model's numbers."""

GENERATION = frozenset(
    """
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id max_length min_length do_sample
    early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    """.split()  # noqa: SIM905
)
"""Defaults of generation, which requests state for themselves."""

TASK_HEADS = frozenset({"classifier_dropout", "hidden_dropout", "summary_last_dropout"})
"""What only a task's head reads (tp_decoders.task_config), in families whose decoder has no use for it."""

NOT_DECODERS: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": (None, {}),
}
"""Options of PretrainedConfig that would make it another model: accepted at these values only, save by the families
that ask for one.
"""

REQUIRED: Any = object()


class Fields:
    """A JSON object being read; remembers which keys have been asked for."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where} should be a JSON object, not {values!r}")
        self.values = values
        self.where = where
        self.seen: set[str] = set()

    def take(self, key: str, default: Any = REQUIRED, aliases: tuple[str, ...] = ()) -> Any:
        """The raw value under any of its names; two names may not disagree."""
        self.seen.update((key, *aliases))
        found = {name: self.values[name] for name in (key, *aliases) if name in self.values}
        if not found:
            if default is REQUIRED:
                raise ConfigError(f"{self.where} has no {key!r}, which says the model's shape; add it")
            return default
        values = list(found.values())
        if any(value != values[0] for value in values):
            raise ConfigError(f"{self.where}: {found} are names of one option and disagree; keep one of them")
        return values[0]

    def refuse(self, key: str, accepted: str) -> ConfigError:
        return ConfigError(f"{self.where}: {key} = {self.values.get(key)!r} is not supported; accepted: {accepted}")

    def integer(self, key: str, default: Any = REQUIRED, *, least: int = 1, aliases: tuple[str, ...] = ()) -> int:
        value = self.take(key, default, aliases)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.refuse(key, f"an integer of at least {least}")
        return value

    def optional_integer(self, key: str, *, least: int = 1) -> int | None:
        return None if self.take(key, None) is None else self.integer(key, least=least)

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
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
            raise self.refuse(key, "a number")
        if above is not None and value <= above:
            raise self.refuse(key, f"a number above {above}")
        if within is not None and not within[0] <= value <= within[1]:
            raise self.refuse(key, f"a number from {within[0]} to {within[1]}")
        return float(value)

    def optional_number(self, key: str, *, above: float | None = None) -> float | None:
        return None if self.take(key, None) is None else self.number(key, above=above)

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
        """A nested object, to be read as strictly; None where it is absent or null."""
        value = self.take(key, None)
        return None if value is None else Fields(value, f"{self.where}: {key}")

    def finish(self, harmless: Iterable[str] = ()) -> None:
        """Refuses every key that was neither asked for nor known to be harmless."""
        for key, accepted in NOT_DECODERS.items():
            if key not in self.seen:
                self.only(key, *accepted)
        unknown = sorted(set(self.values) - self.seen - BOOKKEEPING - GENERATION - TASK_HEADS - set(harmless))
        if unknown:
            given = ", ".join(f"{key} = {self.values[key]!r}" for key in unknown)
            raise ConfigError(
                f"{self.where}: {given}: not an option this project knows, and ignoring it could change the model; "
                f"it accepts {', '.join(sorted(self.seen))}"
            )
