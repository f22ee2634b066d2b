"""The vocabulary's tables as transformers' models give and take them: looked up, replaced, made longer or shorter.

All ranks call the functions that change something, with the same arguments, before an optimiser or an engine is made of
the model: parameters are replaced. The vocabulary is dealt anew over the ranks. Collectives: one gather per table.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from parallel.errors import ConfigError
from parallel.ranks.gather_parameter import whole_tensor
from parallel.ranks.group import Group
from parallel.sharding.rules import rule_of
from parallel.vocabulary.vocab_parallel import VocabEmbedding, VocabHead
from tp_decoders.model.config import DecoderConfig
from tp_decoders.model.place import Place

EMBEDDING, HEAD = "embed.weight", "head.linear.weight"


class VocabularyTables(nn.Module):
    """What of a decoder the vocabulary's length decides: its embedding, and a head that may be tied to it."""

    config: DecoderConfig
    group: Group
    embed: VocabEmbedding
    head: VocabHead  # of a model that has one
    init_std: Callable[[DecoderConfig, str], float]  # that a fresh matrix, by our name for it, is drawn with

    @property
    def task(self) -> str:
        """What the model is for, by the name `load` takes."""
        return self.config.task.name if self.config.task else "causal-lm"

    @property
    def has_vocabulary(self) -> bool:
        """Whether there is a language-modelling head."""
        return "head" in self._modules

    def get_input_embeddings(self) -> VocabEmbedding:
        """The embedding; its weight holds this rank's rows."""
        return self.embed

    def get_output_embeddings(self) -> VocabHead | None:
        """The vocabulary head, None where there is none."""
        return self.head if self.has_vocabulary else None

    def set_input_embeddings(self, value: nn.Embedding | VocabEmbedding | Tensor) -> None:
        """The whole table [V, D], of the model's vocabulary or, where the head is tied to it or missing, another."""
        _set_input_embeddings(self, value)

    def set_output_embeddings(self, value: nn.Linear | VocabHead | Tensor) -> None:
        """The head's whole matrix [V, D], of a model that is not tied."""
        _set_output_embeddings(self, value)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> VocabEmbedding:
        """The vocabulary made longer or shorter; all ranks call this."""
        return _resize(self, new_num_tokens, pad_to_multiple_of, mean_resizing)


def _resize(
    model: VocabularyTables, size: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
) -> VocabEmbedding:
    """Makes the vocabulary `size` tokens long (None: as it is), rounded up to a multiple; returns the embedding.

    Rows that stay keep their bits. New ones are the mean of the old, which transformers draws closely around; with
    mean_resizing=False they are drawn by the family's rule.
    """
    before = model.config.vocab_size
    after = _target(before, size, pad_to_multiple_of)
    if after != before:
        _refuse_adapter(model)
        old = {EMBEDDING: model.embed.weight}
        if model.has_vocabulary and not model.config.tie:
            old[HEAD] = model.head.linear.weight
        tables = {name: whole_tensor(weight, model.group) for name, weight in old.items()}
        _put(model, {name: _resized(model, name, full, after, mean_resizing) for name, full in tables.items()})
    return model.embed


def _set_input_embeddings(model: VocabularyTables, value: nn.Embedding | VocabEmbedding | Tensor) -> None:
    """Replaces the embedding, and a head tied to it, by a whole table [V, D]: the same on every rank."""
    _put(model, {EMBEDDING: _table(model, value)})


def _set_output_embeddings(model: VocabularyTables, value: nn.Linear | VocabHead | Tensor) -> None:
    """Replaces the head's matrix [V, D] of a model that is not tied."""
    if not model.has_vocabulary or model.config.tie:
        raise ConfigError(
            "the model's head is the embedding's own matrix: call set_input_embeddings"
            if model.has_vocabulary
            else f"a model loaded for {model.task} has no vocabulary head; load it with task='causal-lm'"
        )
    _put(model, {HEAD: _table(model, value)})


def _target(before: int, size: int | None, multiple: int | None) -> int:
    for name, number in (("the new vocabulary", size), ("pad_to_multiple_of", multiple)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise ConfigError(f"{name} is {number!r}; give a whole number of at least 1, or leave it out")
    wanted = before if size is None else size
    return wanted if multiple is None else -(-wanted // multiple) * multiple


def _refuse_adapter(model: VocabularyTables) -> None:
    if model.has_vocabulary and model.head.linear.adapter is not None:
        raise ConfigError("the head has an adapter of the old vocabulary's size; merge and detach it first")


@torch.no_grad()
def _table(model: VocabularyTables, value: nn.Module | Tensor) -> Tensor:
    """The whole matrix that was given, as this model computes."""
    given = value if isinstance(value, Tensor) else value.weight
    assert isinstance(given, Tensor), "modules with a matrix"
    full = whole_tensor(given, value.group) if isinstance(value, (VocabEmbedding, VocabHead)) else given.detach()
    if full.dim() != 2 or full.shape[1] != model.config.d_model or not len(full) or not full.is_floating_point():
        raise ConfigError(
            f"a table of {full.dtype}, shape {list(full.shape)}; give [vocabulary, {model.config.d_model}] of a "
            "floating-point type"
        )
    return full.to(model.embed.weight.device, model.embed.weight.dtype)


@torch.no_grad()
def _resized(model: VocabularyTables, name: str, full: Tensor, size: int, mean: bool) -> Tensor:
    old = full[:size]
    count = size - len(old)
    if count == 0:
        return old
    if mean:
        rows = full.float().mean(0).expand(count, -1)
    else:
        std = model.init_std(model.config, name)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {len(old)} {size}".encode()))
        rows = torch.empty(count, full.shape[1]).normal_(0.0, std, generator=generator)
    return torch.cat([old, rows.to(full)])


@torch.no_grad()
def _put(model: VocabularyTables, tables: Mapping[str, Tensor]) -> None:
    """Gives the model new tables; a head that is not tied must keep the embedding's length."""
    config, group, weight = model.config, model.group, model.embed.weight
    size = len(next(iter(tables.values())))
    untied = model.has_vocabulary and not config.tie
    if size != config.vocab_size and untied and len(tables) == 1:
        raise ConfigError(
            f"a table of {size} tokens beside one of {config.vocab_size}, which is not tied to it; call "
            f"resize_token_embeddings({size}) first"
        )
    place = Place(dtype=weight.dtype, device=weight.device)
    if EMBEDDING in tables:
        model.embed = VocabEmbedding(size, config.d_model, group=group, **place)
        _fill(model.embed.weight, tables[EMBEDDING], weight, group.rank)
    if model.has_vocabulary and (HEAD in tables or config.tie):
        old = model.head
        tied = model.embed.weight if config.tie else None
        model.head = VocabHead(size, config.d_model, group=group, weight=tied, scale=old.scale, **place)
        if tied is None:
            _fill(model.head.linear.weight, tables[HEAD], old.linear.weight, group.rank)
    model.config = replace(config, vocab_size=size, hf={**config.hf, "vocab_size": size})


def _fill(parameter: nn.Parameter, full: Tensor, old: Tensor, rank: int) -> None:
    parameter.copy_(rule_of(parameter).take(full, rank))
    parameter.requires_grad_(old.requires_grad)
