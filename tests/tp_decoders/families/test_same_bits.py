"""The same bits at every tensor-parallel size, alone or packed: logits, log-probabilities, loss and gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.attention.forward_pass import Pass
from parallel.ranks.group import Group
from parallel.sharding.rules import rule_of
from parallel.vocabulary.cross_entropy import vocab_cross_entropy
from tests.tp_decoders.families.parity import LENGTHS, write_reference
from tp_decoders import load

# importing transformers' GPT-BigCode warns
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

CASES = (
    "gpt2 25 heads",
    "neox",
    "neox 3 heads",
    "neox sequential",
    "japanese",
    "mpt",
    "mpt query-key norm",
    "mpt multi-query norm",
    "bigcode",
    "bigcode multi-head 3 heads",
    "llama",
    "llama 3 of 6 heads",
    "llama 2 of 14 heads",
    "llama 8 of 16 heads",
    "qwen3 3 of 12 heads",
)
SIZES = (2, 3, 4, 8)


def outcome(group: Group, folder: str, dtype: torch.dtype, lengths: tuple[int, ...], start: int) -> dict[str, Tensor]:
    """Everything one forward and backward computes, for the tokens from `start` on as sequences of these lengths."""
    reference = torch.load(Path(folder) / "reference.pt")
    model = load(folder, group=group, dtype=dtype)
    tokens, targets = (reference[name][start : start + sum(lengths)] for name in ("tokens", "targets"))
    logits = model(tokens, Pass.packed(lengths))
    loss = vocab_cross_entropy(logits, targets, model.head.shards, group)
    loss.backward()
    with torch.no_grad():
        served = model(tokens, Pass.packed(lengths))
        found = {
            "logits": model.head.gather(logits.detach()),
            "served": model.head.gather(served),
            "loss": loss.detach(),
        }
        found["log_probs"] = model.head.log_probs(served, targets.clamp(min=0))
    shards = {name: (rule_of(parameter), parameter.grad) for name, parameter in model.named_parameters()}
    return {**found, "grads": shards}  # type: ignore[dict-item]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_bits_do_not_depend_on_the_number_of_ranks(
    case: str, dtype: torch.dtype, ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    write_reference(case, tmp_path)
    one = ranks(1, outcome, str(tmp_path), dtype, LENGTHS, 0)[0]
    assert torch.equal(one["logits"], one["served"])
    for size in SIZES:
        for rank, other in enumerate(ranks(size, outcome, str(tmp_path), dtype, LENGTHS, 0)):
            for name in ("logits", "served", "loss", "log_probs"):
                assert torch.equal(other[name], one[name]), f"{name} at tp {size}"
            for name, (rule, grad) in other["grads"].items():
                assert torch.equal(grad, rule.take(one["grads"][name][1], rank)), f"gradient of {name} at tp {size}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_a_sequences_logits_do_not_depend_on_its_neighbours(
    case: str, dtype: torch.dtype, ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    write_reference(case, tmp_path)
    together = ranks(2, outcome, str(tmp_path), dtype, LENGTHS, 0)[0]
    start = LENGTHS[0] + LENGTHS[1]
    alone = ranks(2, outcome, str(tmp_path), dtype, LENGTHS[2:], start)[0]
    for name in ("logits", "served", "log_probs"):
        assert torch.equal(together[name][start:], alone[name]), name
