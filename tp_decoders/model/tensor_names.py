"""How a checkpoint's tensor names correspond to ours: one table per family, read in both directions.

A line is `Name("h.{i}.attn.c_attn.weight", "blocks.{i}.qkv.weight", transposed=True)`; `{i}` stands for a layer
number. Historic checkpoints leave out the prefix (`transformer.`), trainers write more (`module.`), old versions saved
buffers that nobody needs: loading takes them all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

LAYER = "{i}"


@dataclass(frozen=True)
class Name:
    """One line of a table. Names outside the base model (the head's) have no prefix."""

    theirs: str
    ours: str
    transposed: bool = False
    prefixed: bool = True


@dataclass(frozen=True)
class Found:
    """One of our parameters under the name a checkpoint gives it; `ours` is None for a tensor that is not needed."""

    ours: str | None
    transposed: bool


def block_names(theirs: str, ours: str, pairs: dict[str, str], transposed: Iterable[str] = ()) -> tuple[Name, ...]:
    """The weight and bias of each module of a block, {theirs: ours}; `transposed` weights are stored [in, out]."""
    flipped = set(transposed)
    return tuple(
        Name(f"{theirs}.{LAYER}.{a}.{leaf}", f"{ours}.{LAYER}.{b}.{leaf}", transposed=leaf == "weight" and a in flipped)
        for a, b in pairs.items()
        for leaf in ("weight", "bias")
    )


TASK_HEAD = "task_head."
HEADS = tuple(
    Name(f"{theirs}.{leaf}", f"{TASK_HEAD}{ours}.{leaf}", prefixed=False)
    for theirs, ours in (
        ("score", "score"),
        ("classifier", "classifier"),
        ("qa_outputs", "qa_outputs"),
        ("multiple_choice_head.summary", "summary"),
    )
    for leaf in ("weight", "bias")
)
"""The heads of other tasks than language modelling, named alike in every family."""


WRAPPERS = re.compile(r"(module\.|_orig_mod\.|model\.)+")
"""What DistributedDataParallel, torch.compile and trainers write before every name."""
BUFFER = re.compile(
    r"(.*\.)?((attn|attention|crossattention)\.(bias|masked_bias)|rotary_emb\.(inv_freq|cos_cached|sin_cached)"
    r"|attn_bias|alibi)|bias"
)
"""Masks and tables that versions of transformers and llm-foundry saved beside the weights, and make anew."""


class NameMap:
    """A family's table, compiled. `prefix` is what transformers writes before the base model's tensors."""

    def __init__(self, prefix: str, names: tuple[Name, ...]) -> None:
        self.prefix = prefix
        self.names = (*names, *HEADS)
        self._theirs = [(_pattern(name.theirs), name) for name in self.names]
        self._ours = [(_pattern(name.ours), name) for name in self.names]

    def find(self, theirs: str) -> Found | None:
        """What the table says of a checkpoint's name, or that it is a buffer; None for a name nobody knows."""
        bare = WRAPPERS.sub("", theirs).removeprefix(self.prefix)
        for pattern, name in self._theirs:
            match = pattern.fullmatch(bare)
            if match:
                ours = name.ours.replace(LAYER, match.groupdict().get("i", ""))
                return Found(ours, name.transposed)
        return Found(None, False) if BUFFER.fullmatch(bare) else None

    def theirs(self, ours: str) -> tuple[Name, str]:
        """The line and the checkpoint's name, with its prefix, of one of our parameters."""
        for pattern, name in self._ours:
            match = pattern.fullmatch(ours)
            if match:
                bare = name.theirs.replace(LAYER, match.groupdict().get("i", ""))
                return name, self.prefix + bare if name.prefixed else bare
        raise KeyError(f"the name table has no line for parameter {ours!r}")


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(re.escape(LAYER), r"(?P<i>0|[1-9]\d*)"))
