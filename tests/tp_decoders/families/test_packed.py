"""Documents packed in one row are computed as if each were alone: outputs bit for bit, gradients as their sum.

Learned positions, rotary (plain and scaled) and ALiBi; one shared kv head and one per head; 1 and 2 ranks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.training.data.batches.data_loader import Loader
from cluster.training.data.batches.packing import PackedDataset
from cluster.training.data.corpus.sources import SourceOptions, open_source
from cluster.training.data.store.token_store import TokenStore
from cluster.training.data.store.tokenize_corpus import tokenize_corpus
from cluster.training.step.train_batch import TrainBatch
from cluster.training.step.trainer import Trainer, TrainerConfig
from parallel.attention.forward_pass import Pass
from parallel.ranks.group import Group, Numerics
from parallel.ranks.mesh import Groups
from parallel.vocabulary.cross_entropy import IGNORE_INDEX, vocab_token_losses
from tests.tp_decoders.families.dense_mpt import DenseMpt
from tests.tp_decoders.families.parity import GPT2, JAPANESE, LLAMA, MPT, NEOX, NO_GRADIENT, error, hash_of, hf, mpt
from tp_decoders import load
from tp_decoders.model.decoder import Decoder

# importing transformers' GPT-BigCode warns
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

VOCAB = 29  # of the smallest of them
LENGTHS = (70, 1, 130, 9)  # longer than a block of keys, and as short as can be
CONTEXT = 160
TOLERANCE = 1e-5
SPECIAL = {"n_positions": CONTEXT}
LONG = {"max_position_embeddings": CONTEXT}

CASES: dict[str, Callable[[], Any]] = {
    "gpt2": hf("GPT2", GPT2, **SPECIAL),
    "neox": hf("GPTNeoX", NEOX, **LONG),
    "neox sequential": hf("GPTNeoX", NEOX, **LONG, use_parallel_residual=False, rotary_pct=1.0),
    "neox linear scaling": hf("GPTNeoX", NEOX, **LONG, rope_scaling={"type": "linear", "factor": 2.5}),
    "neox dynamic scaling": hf(
        "GPTNeoX", NEOX, max_position_embeddings=64, rotary_pct=0.5, rope_scaling={"rope_type": "dynamic", "factor": 4}
    ),
    "japanese": hf("GPTNeoXJapanese", JAPANESE, **LONG),
    "mpt": hf("Mpt", MPT, max_seq_len=CONTEXT),
    "mpt 3 heads": hf("Mpt", MPT, max_seq_len=CONTEXT, n_heads=3),
    "mpt learned positions": mpt(max_seq_len=CONTEXT, attn_config={"alibi": False}, learned_pos_emb=True),
    "mpt multi-query norm": mpt(
        max_seq_len=CONTEXT, attn_config={"attn_type": "multiquery_attention", "qk_ln": True}, no_bias=False
    ),
    "bigcode": hf("GPTBigCode", GPT2, **SPECIAL),
    "bigcode multi-head": hf("GPTBigCode", GPT2, **SPECIAL, multi_query=False),
    "llama": hf("Llama", {**LLAMA, **LONG}),
}  # fmt: skip
ONE_PER_FAMILY = ("gpt2", "neox", "japanese", "mpt", "bigcode", "llama")


def write_model(case: str, folder: Path) -> str:
    torch.manual_seed(hash_of(case))
    model = CASES[case]()
    (model.save if isinstance(model, DenseMpt) else model.save_pretrained)(folder)
    return str(folder)


def documents(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (length,), generator=generator) for length in LENGTHS]


def weights_of(parts: Sequence[Tensor]) -> list[Tensor]:
    return [0.5 + torch.arange(len(part)) % 3 for part in parts]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One forward and backward: per document its local logits and log-probabilities, and the gradients of all."""

    logits: Sequence[Tensor]
    logprobs: Sequence[Tensor]
    loss: Tensor
    grads: dict[str, Tensor]


def outcome(model: Decoder, parts: Sequence[Tensor], weights: Sequence[Tensor] | None = None) -> Outcome:
    """The parts packed in one row."""
    lengths = [len(part) for part in parts]
    targets = torch.cat([torch.cat([part[1:], torch.tensor([IGNORE_INDEX])]) for part in parts])
    logits = model(torch.cat(list(parts)), Pass.packed(lengths))
    losses = vocab_token_losses(logits, targets, model.head.shards, model.group)
    loss = (losses * torch.cat(list(weights or weights_of(parts)))).sum()
    model.zero_grad()
    loss.backward()
    return Outcome(
        logits=logits.detach().split(lengths), logprobs=losses.detach().split(lengths), loss=loss.detach(),
        grads={name: parameter.grad.clone() for name, parameter in model.named_parameters()},  # type: ignore[union-attr]
    )  # fmt: skip


def differences(ours: Sequence[Tensor], theirs: Sequence[Tensor], what: str, bound: float) -> list[str]:
    """What differs: any bit of it where the bound is 0."""
    return [
        f"{what} of document {i}"
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True))
        if not (torch.equal(a, b) or (bound and error(a, b, b) <= bound))
    ]


def wrong_gradients(found: dict[str, Tensor], wanted: Sequence[dict[str, Tensor]]) -> list[str]:
    """The parameters whose gradient is not the sum of those wanted."""
    wrong = []
    for name, gradient in found.items():
        total = torch.stack([each[name].double() for each in wanted]).sum(0)
        scale = torch.ones(()) if name.endswith(NO_GRADIENT) else total
        if not error(gradient.double(), total, scale) <= TOLERANCE:
            wrong.append(f"the gradient of {name}")
    return wrong


def leaks(group: Group, folder: str, numerics: Numerics, sequence_parallel: bool) -> list[str]:
    """What of the packed row is not as its documents make it alone."""
    bound = TOLERANCE if numerics == "fast" else 0.0
    group = replace(group, numerics=numerics, sequence_parallel=sequence_parallel)
    model, parts = load(folder, group=group), documents()
    packed, alone = outcome(model, parts), [outcome(model, [part]) for part in parts]
    wrong = differences(packed.logits, [each.logits[0] for each in alone], "logits", bound)
    wrong += differences(packed.logprobs, [each.logprobs[0] for each in alone], "log-probabilities", bound)
    wrong += wrong_gradients(packed.grads, [each.grads for each in alone])
    total = sum(float(each.loss) for each in alone)
    return wrong + ([] if abs(float(packed.loss) - total) <= TOLERANCE * total else ["the loss"])


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_a_packed_row_is_its_documents_alone(
    case: str, size: int, ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    folder = write_model(case, tmp_path)
    assert ranks(size, leaks, folder, "invariant", False) == [[]] * size
    if case in ONE_PER_FAMILY:
        assert ranks(size, leaks, folder, "fast", False) == [[]] * size, "plain sums"
        if size > 1:
            assert ranks(size, leaks, folder, "invariant", True) == [[]] * size, "sequence parallel"


def half_precision_leaks(group: Group, folder: str) -> list[str]:
    model, parts = load(folder, group=group, dtype=torch.bfloat16), documents()
    packed, alone = outcome(model, parts), [outcome(model, [part]) for part in parts]
    return differences(packed.logprobs, [each.logprobs[0] for each in alone], "log-probabilities", 0.0)


@pytest.mark.parametrize("case", ONE_PER_FAMILY)
def test_the_same_bits_in_bfloat16(case: str, ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    assert ranks(2, half_precision_leaks, write_model(case, tmp_path)) == [[], []]


def influence(group: Group, folder: str) -> tuple[list[str], list[str]]:
    """What changes in all documents when the third is another one, and when documents swap places."""
    model, parts = load(folder, group=group), documents()
    changed = [*parts[:2], documents(1)[2], parts[3]]
    before, after, swapped = (outcome(model, given) for given in (parts, changed, parts[::-1]))
    moved = differences(swapped.logits[::-1], before.logits, "logits", 0.0)
    return differences(after.logits, before.logits, "logits", 0.0), moved


@pytest.mark.parametrize("case", CASES)
def test_another_document_changes_nothing_but_itself(
    case: str, ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    for changed, moved in ranks(2, influence, write_model(case, tmp_path)):
        assert changed == ["logits of document 2"]
        assert moved == [], "its place in the row"


def one_document_learned(group: Group, folder: str) -> list[str]:
    """The gradients where only the third document has weight, against those of that document alone."""
    model, parts = load(folder, group=group), documents()
    weights = [given * (number == 2) for number, given in enumerate(weights_of(parts))]
    wrong = wrong_gradients(outcome(model, parts, weights).grads, [outcome(model, parts[2:3], weights[2:3]).grads])
    first = outcome(model, parts[2:3], [weights[2] * (torch.arange(LENGTHS[2]) < 60)])
    cut = outcome(model, [parts[2][:61]], [weights[2][:61] * (torch.arange(61) < 60)])
    return wrong + [f"{name}, of what follows" for name in wrong_gradients(first.grads, [cut.grads])]


@pytest.mark.parametrize("case", CASES)
def test_tokens_without_weight_contribute_nothing(case: str, ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    assert ranks(2, one_document_learned, write_model(case, tmp_path)) == [[], []]


class Letters:
    """A tokenizer of texts of letters: a is 1, b is 2; 0 ends a text."""

    vocab_size, eos_token_id = VOCAB, 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1 + ord(letter) - ord("a") for letter in text]


def write_corpus(folder: Path) -> str:
    """Texts of all lengths, some with a prompt of which nothing is learned."""
    letters = [
        "".join(chr(ord("a") + int(token) % 26) for token in part) for seed in range(5) for part in documents(seed)
    ]
    rows = [{"text": text, "prompt": "why" * (number % 3)} for number, text in enumerate(letters)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenize_corpus(
        open_source(folder / "corpus.jsonl", SourceOptions(prompt_field="prompt")), Letters(), folder / "tokens"
    )
    return str(folder / "tokens")


def loaded_batch(tokens: str) -> TrainBatch:
    """Packed documents as a job's loader deals them."""
    batch = next(Loader(PackedDataset(TokenStore.open(Path(tokens)), tokens_per_sample=CONTEXT), batch_size=3))
    return TrainBatch(
        token_ids=batch.token_ids, targets=batch.targets, weights=batch.loss_weights, lengths=batch.lengths,
        normaliser=float(batch.global_weight),
    )  # fmt: skip


def trained(group: Group, folder: str, batches: Sequence[TrainBatch], **config: Any) -> tuple[Tensor, float, Any]:
    """(log-probabilities, loss, gradients by name) that a trainer adds up over some batches."""
    trainer = Trainer(load(folder, group=group), Groups(group, Group.single()), TrainerConfig(**config))
    passes = [trainer.forward_backward(batch) for batch in batches]
    grads = {name: flat.view(flat.grad, name).clone() for flat in trainer.optimizer.flats for name in flat.parameters}
    trainer.optimizer.close()
    return torch.cat([each.logprobs for each in passes]), sum(each.loss for each in passes), grads


def trainer_leaks(group: Group, folder: str, tokens: str) -> list[str]:
    """What a trainer's packed batch gives differently from its documents one by one, and from micro-batches."""
    batch = loaded_batch(tokens)
    assert len(batch.lengths) > 3 and bool((batch.weights == 0).any()), "several documents, some with prompts"
    logprobs, loss, grads = trained(group, folder, [batch])
    wrong = []
    for name, batches, config in (
        ("alone", list(batch.parts(1)), {}),
        ("micro-batches", [batch], {"micro_batch_tokens": 100}),
        ("recomputed", [batch], {"recompute": "full"}),
        ("partly recomputed", [batch], {"recompute": "selective"}),
    ):
        other_logprobs, other_loss, other = trained(group, folder, batches, **config)
        wrong += [] if torch.equal(other_logprobs, logprobs) else [f"log-probabilities, {name}"]
        wrong += [] if abs(other_loss - loss) <= TOLERANCE * loss else [f"loss, {name}"]
        wrong += [f"{what}, {name}" for what in wrong_gradients(grads, [other])]
    return wrong


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("case", [*ONE_PER_FAMILY, "mpt learned positions", "bigcode multi-head"])
def test_a_trainer_learns_the_same_from_packed_documents(
    case: str, size: int, ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    assert ranks(size, trainer_leaks, write_model(case, tmp_path), write_corpus(tmp_path)) == [[]] * size


def unlearned_tokens_count(group: Group, folder: str, tokens: str) -> list[str]:
    """Whether it matters how a token is marked as not to be learned, or what it should have been."""
    batch = loaded_batch(tokens)
    unlearned = (torch.arange(len(batch.targets)) % 3 == 0) | (batch.weights == 0)
    weighted = replace(batch, weights=torch.where(unlearned, 0.0, batch.weights))
    others = {
        "ignored": replace(batch, targets=torch.where(unlearned, IGNORE_INDEX, batch.targets)),
        "other targets": replace(weighted, targets=torch.where(unlearned, 5, batch.targets)),
    }
    _, loss, grads = trained(group, folder, [weighted])
    wrong = []
    for name, other in others.items():
        _, other_loss, other_grads = trained(group, folder, [other])
        same = all(torch.equal(grads[key], other_grads[key]) for key in grads)
        wrong += [] if same and other_loss == loss else [name]
    _, whole_loss, _ = trained(group, folder, [batch])
    return wrong + ([] if whole_loss > loss else ["every token counts for nothing"])


@pytest.mark.parametrize("case", ONE_PER_FAMILY)
def test_weight_zero_and_ignored_targets_are_the_same_to_the_bit(
    case: str, ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    assert ranks(2, unlearned_tokens_count, write_model(case, tmp_path), write_corpus(tmp_path)) == [[], []]
