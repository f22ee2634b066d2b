"""What a family's file says of the family: all that the rest of the code asks about one it does not know by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from parallel.ranks.group import Group
from tp_decoders.files.json_fields import Fields
from tp_decoders.model.config import DecoderConfig
from tp_decoders.model.decoder import Decoder
from tp_decoders.model.place import Place
from tp_decoders.model.task_config import CAUSAL, SEQUENCES, SPANS, TOKENS
from tp_decoders.model.tensor_names import NameMap

AUTO = "auto"
"""Of a choice: the file says, or what is known of it."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family; the first four make a causal one, the rest is what it may have otherwise than most."""

    types: Mapping[str, str]  # the model types whose config.json it reads, and how transformers' classes of each begin
    from_hf: Callable[[Fields], DecoderConfig]
    model: Callable[[DecoderConfig, Group, Place], Decoder]
    names: NameMap
    tokenizer: str = ""  # the class, without "Fast", of its tokenizer where no file names one
    tasks: tuple[str, ...] = (CAUSAL, SEQUENCES, TOKENS, SPANS)
    task_layers: Mapping[str, str] = field(default_factory=dict)  # of tensor_names.HEADS, where not as in task_heads
    lora_targets: tuple[str, ...] = ("qkv",)  # our names, or ends of them, of what makes queries, keys and values
    integers: tuple[str, ...] = ()  # of config.json: what transformers declares so besides config_writer.INTEGERS
    floats: tuple[str, ...] = ()  # the same
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of config.json: what a caller may decide
