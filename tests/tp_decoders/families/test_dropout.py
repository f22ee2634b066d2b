"""Dropout of every family against transformers, whose dropout calls are made to use our masks, in their order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tp_decoders
from parallel.attention.forward_pass import Pass
from parallel.layers.dropout import ATTENDED, ATTENTION, EMBEDDED, EMBEDDING, MLP, Dropping, HeadMasks, Odds, token_keys
from parallel.options import Recompute
from parallel.ranks.group import Group
from parallel.sharding.rules import rule_of
from parallel.vocabulary.cross_entropy import vocab_cross_entropy
from tests.tp_decoders.families.parity import LLAMA, error, hash_of, hf
from tp_decoders.registry import family_of

LENGTHS = (11, 6)
SEED = 5
VOCAB = 31
GPT2 = {"vocab_size": VOCAB, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 4}
NEOX = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 72,
    "max_position_embeddings": 32, "hidden_dropout": 0.2, "attention_dropout": 0.3,
}  # fmt: skip
PDROPS = {"embd_pdrop": 0.1, "attn_pdrop": 0.3, "resid_pdrop": 0.2}
MPT = {"vocab_size": VOCAB, "d_model": 24, "n_heads": 4, "n_layers": 2, "max_seq_len": 32}
CASES: dict[str, tuple[Any, str]] = {  # and what is dropped besides probabilities
    "gpt2": (hf("GPT2", GPT2, **PDROPS), "embeddings and blocks"),
    "gpt_neox": (hf("GPTNeoX", NEOX), "embeddings and blocks"),
    "gpt_neox sequential": (hf("GPTNeoX", NEOX, use_parallel_residual=False), "embeddings and blocks"),
    "gpt_neox_japanese": (hf("GPTNeoXJapanese", {k: v for k, v in NEOX.items() if k != "intermediate_size"}), "blocks"),
    # transformers drops what a block adds with the attention's probability; in llm-foundry it has its own
    "mpt": (hf("Mpt", MPT, attn_config={"attn_pdrop": 0.2}, resid_pdrop=0.2), "blocks"),
    "gpt_bigcode": (hf("GPTBigCode", GPT2, **PDROPS), "embeddings and blocks"),
    "gpt_bigcode per-head keys": (hf("GPTBigCode", GPT2, multi_query=False, **PDROPS), "embeddings and blocks"),
    "llama": (hf("Llama", LLAMA, num_attention_heads=4, attention_dropout=0.3), "nothing"),
}


def masks_in_order(layers: int, heads: int, besides: str) -> Iterator[tuple[int, int, int]]:
    """(layer, kind, heads) of each dropout call of one forward."""
    if "embeddings" in besides:
        yield EMBEDDED, EMBEDDING, 0
    for layer in range(layers):
        yield layer, ATTENTION, heads
        if "blocks" in besides:
            yield layer, ATTENDED, 0
            yield layer, MLP, 0


@contextmanager
def dropping_by_our_masks(monkeypatch: pytest.MonkeyPatch, keys: Tensor, besides: str) -> Iterator[None]:
    order, dropping = masks_in_order(2, 4, besides), Dropping(SEED, keys)

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        layer, kind, heads = next(order)
        assert training and p > 0
        if heads:
            assert x.shape == (1, heads, len(keys), len(keys))
            masks = HeadMasks(Odds(p), dropping.site_keys(layer, kind), range(heads))
            return x * masks.factors(0, len(keys))
        return x * Odds(p).factors(dropping.site_keys(layer, kind), torch.arange(x.shape[-1]))

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "dropout", dropout)
        yield
    assert next(order, None) is None, "not all sites were visited"


def reference(model: Any, monkeypatch: pytest.MonkeyPatch, besides: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss summed over documents, and every gradient."""
    total, keys = torch.zeros(()), token_keys(range(len(LENGTHS)), LENGTHS).split(LENGTHS)
    for document, own in zip(documents(), keys, strict=True):
        with dropping_by_our_masks(monkeypatch, own, besides):
            logits = model.train()(document[None]).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, document[1:], reduction="sum")
    total.backward()
    return total.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def documents() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(VOCAB, (length,), generator=generator) for length in LENGTHS]


def deviation(
    group: Group, folder: str, recompute: Recompute, sequence_parallel: bool
) -> tuple[float, dict[str, float]]:
    """One rank: the loss, and how far its part of every gradient is from the reference's."""
    group = replace(group, sequence_parallel=sequence_parallel)
    model = tp_decoders.load(folder, group=group)
    model.recompute = recompute
    tokens = torch.cat(documents())
    targets = torch.cat([torch.cat([d[1:], torch.tensor([-100])]) for d in documents()])
    keys = token_keys(range(len(LENGTHS)), LENGTHS)
    logits = model.train()(tokens, Pass.packed(LENGTHS, dropping=Dropping(SEED, keys)))
    loss = vocab_cross_entropy(logits, targets, model.head.shards, group) * (targets != -100).sum()
    loss.backward()
    grads, names, errors = torch.load(Path(folder) / "grads.pt"), family_of(model.config.model_type).names, {}
    for ours, parameter in model.named_parameters():
        name, theirs = names.theirs(ours)
        full = grads[theirs].t() if name.transposed else grads[theirs]
        assert parameter.grad is not None, f"{ours} has no gradient"
        errors[ours] = error(parameter.grad, rule_of(parameter).take(full, group.rank), full)
    return float(loss.detach()), errors


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_transformers_under_the_same_masks(
    ranks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    make, besides = CASES[case]
    torch.manual_seed(hash_of(case))
    model = make()
    model.save_pretrained(tmp_path)
    loss, grads = reference(model, monkeypatch, besides)
    torch.save(grads, tmp_path / "grads.pt")
    plain = torch.stack([model.eval()(d[None], labels=d[None]).loss * (len(d) - 1) for d in documents()]).sum()
    assert abs(loss - plain) > 0.01, "the masks must matter"
    layouts: list[tuple[int, Recompute, bool]] = [(1, "none", False), (2, "selective", True), (3, "full", True)]
    bits = set()
    for size, recompute, sequence_parallel in layouts:
        for found, errors in ranks(size, deviation, str(tmp_path), recompute, sequence_parallel):
            assert found == pytest.approx(float(loss), rel=1e-5), size
            assert not {name: e for name, e in errors.items() if not e <= 1e-4}, size
            bits.add(found)
    assert len(bits) == 1, "the same masks and the same sums at every layout"
