"""The losses against definitions written out over padded batches, as trl has them, gradients down to the logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cluster.training.step.losses import LOSSES, LossInputs, LossOptions, LossTerms, compute_loss
from cluster.training.step.nonfinite_errors import NonFinite
from parallel.errors import ConfigError, RequestError

LENGTHS = (5, 3, 1, 7, 4, 4)  # three pairs for dpo
TOKENS, VOCAB = sum(LENGTHS), 11


class Case:
    """Random logits in float64 and, for each token, what a client sends; some weights are zero and some fractional."""

    def __init__(self, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw)

        self.logits = normal(TOKENS, VOCAB).double().requires_grad_()
        self.targets = torch.randint(VOCAB, (TOKENS,), generator=draw)
        self.weights = torch.tensor([0.0, 1.0, 0.5])[torch.randint(3, (TOKENS,), generator=draw)]
        logprobs = self.logprobs().detach().float()
        self.old = logprobs + 0.3 * normal(TOKENS)
        self.reference = logprobs + 0.5 * normal(TOKENS)
        self.advantages = normal(TOKENS)

    def logprobs(self) -> Tensor:
        return torch.log_softmax(self.logits, -1).gather(1, self.targets[:, None])[:, 0]

    def inputs(self, normaliser: float = 6.5, **changes: Any) -> LossInputs:
        values: dict[str, Any] = {
            "logprobs": self.logprobs(),
            "weights": self.weights,
            "lengths": LENGTHS,
            "normaliser": normaliser,
            "old_logprobs": self.old,
            "advantages": self.advantages,
            "reference_logprobs": self.reference,
        }
        return LossInputs(**(values | changes))

    def gradient(self, loss: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(loss, self.logits)
        return gradient


def padded(values: Tensor) -> Tensor:
    """[sequences, longest]: the layout of the definitions below."""
    return torch.nn.utils.rnn.pad_sequence(list(values.split(list(LENGTHS))), batch_first=True)


def cross_entropy_by_torch(case: Case, options: LossOptions) -> Tensor:
    losses = F.cross_entropy(case.logits, case.targets, reduction="none")
    return (losses * case.weights).sum() / 6.5


def importance_sampling_written_out(case: Case, options: LossOptions) -> Tensor:
    """trl, GRPO without clipping: coef_1 * advantages, masked, over the number of items in the global batch."""
    coef_1 = torch.exp(padded(case.logprobs()) - padded(case.old))
    per_token_loss = -coef_1 * padded(case.advantages)
    return (per_token_loss * padded(case.weights)).sum() / 6.5


def ppo_written_out(case: Case, options: LossOptions) -> Tensor:
    """trl, GRPO: -min(coef_1 * advantages, coef_2 * advantages), masked, over the items in the global batch."""
    coef_1 = torch.exp(padded(case.logprobs()) - padded(case.old))
    coef_2 = torch.clamp(coef_1, 1 - options.clip_low, 1 + options.clip_high)
    per_token_loss = -torch.min(coef_1 * padded(case.advantages), coef_2 * padded(case.advantages))
    return (per_token_loss * padded(case.weights)).sum() / 6.5


def dpo_written_out(case: Case, options: LossOptions) -> Tensor:
    """trl, DPO sigmoid with label smoothing, chosen and rejected stacked in two halves."""
    logps = (padded(case.logprobs()) * padded(case.weights)).sum(-1)
    ref_logps = (padded(case.reference) * padded(case.weights)).sum(-1)
    chosen_logratios, rejected_logratios = logps[0::2] - ref_logps[0::2], logps[1::2] - ref_logps[1::2]
    delta_score = chosen_logratios - rejected_logratios
    losses = (
        -F.logsigmoid(options.beta * delta_score) * (1 - options.label_smoothing)
        - F.logsigmoid(-options.beta * delta_score) * options.label_smoothing
    )
    return losses.sum() / 6.5


WRITTEN_OUT: dict[str, Callable[[Case, LossOptions], Tensor]] = {
    "cross_entropy": cross_entropy_by_torch,
    "importance_sampling": importance_sampling_written_out,
    "ppo": ppo_written_out,
    "dpo": dpo_written_out,
}
OPTIONS = [LossOptions(), LossOptions(clip_low=0.1, clip_high=0.4, beta=0.7, label_smoothing=0.2)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_loss_and_gradient_are_those_of_the_definition(name: str, options: LossOptions, seed: int) -> None:
    case = Case(seed)
    expected = WRITTEN_OUT[name](case, options)
    found = compute_loss(name, case.inputs(), options).loss
    torch.testing.assert_close(found, expected.float(), rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(case.gradient(found), case.gradient(expected), rtol=2e-6, atol=1e-7)


def parts_of(case: Case, sequences: list[int]) -> LossInputs:
    """Some whole sequences of a batch, with the normaliser of the whole."""
    borders = [0]
    for length in LENGTHS:
        borders.append(borders[-1] + length)
    rows = torch.tensor([row for index in sequences for row in range(borders[index], borders[index + 1])]).long()
    whole = case.inputs()
    given: dict[str, Any] = {name: values[rows] for name, values in whole.given.items()}
    lengths = tuple(LENGTHS[index] for index in sequences)
    return replace(whole, logprobs=whole.logprobs[rows], lengths=lengths, **given)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_parts_of_a_batch_add_up_and_give_the_same_gradients_bit_for_bit(name: str) -> None:
    case = Case()
    whole = compute_loss(name, case.inputs())
    parts = [compute_loss(name, parts_of(case, sequences)) for sequences in ([4, 5], [0, 1, 2, 3], [])]
    torch.testing.assert_close(sum((part.loss for part in parts), torch.zeros(())), whole.loss)
    for metric, value in whole.metrics.items():
        torch.testing.assert_close(sum((part.metrics[metric] for part in parts), torch.zeros(())), value)
    added = sum((case.gradient(part.loss) for part in parts[:2]), torch.zeros_like(case.logits))
    assert torch.equal(added, case.gradient(whole.loss))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_tokens_without_weight_change_nothing_whatever_they_hold(name: str) -> None:
    case = Case()
    before = compute_loss(name, case.inputs())
    rubbish = torch.where(case.weights == 0, torch.tensor([float("nan"), -torch.inf])[torch.arange(TOKENS) % 2], 0.0)
    gradient = case.gradient(before.loss)
    changed = case.inputs(
        logprobs=case.logprobs() + rubbish,
        old_logprobs=case.old + rubbish,
        advantages=case.advantages + rubbish,
        reference_logprobs=case.reference + rubbish,
    )
    after = compute_loss(name, changed)
    assert torch.equal(after.terms, before.terms)
    assert torch.equal(case.gradient(after.loss), gradient)
    assert all(torch.equal(after.metrics[key], before.metrics[key]) for key in before.metrics)


def described(name: str, **changes: Any) -> dict[str, float]:
    terms: LossTerms = compute_loss(name, Case().inputs(**changes))
    assert not any(value.requires_grad for value in terms.metrics.values())
    return {key: float(value) for key, value in terms.metrics.items()}


def test_metrics_of_samples_that_are_on_policy() -> None:
    case = Case()
    total = float(case.weights.sum())
    on_policy = described("ppo", old_logprobs=case.logprobs().detach().float(), normaliser=total)
    assert on_policy == pytest.approx({"ratio": 1.0, "kl": 0.0, "clip_fraction": 0.0}, abs=1e-6)


@pytest.mark.parametrize("name", ["importance_sampling", "ppo"])
def test_metrics_of_samples_that_are_not(name: str) -> None:
    case = Case()
    ratio = torch.exp(case.logprobs().detach().float() - case.old)
    kl = ratio - 1 - torch.log(ratio)
    expected = {"ratio": float((case.weights * ratio).sum() / 6.5), "kl": float((case.weights * kl).sum() / 6.5)}
    found = described(name)
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_the_clip_fraction_counts_the_tokens_whose_gradient_is_taken(seed: int) -> None:
    case = Case(seed)
    num_learned = int((case.weights > 0).sum())
    inputs = case.inputs(normaliser=num_learned, weights=(case.weights > 0).float())
    found = compute_loss("ppo", inputs, LossOptions(clip_low=0.05, clip_high=0.1))
    silent = (case.gradient(found.loss).abs().sum(-1) == 0) & (case.weights > 0)
    assert 0 < int(silent.sum()) < num_learned
    assert float(found.metrics["clip_fraction"]) == pytest.approx(int(silent.sum()) / num_learned)


def test_dpo_describes_the_rewards() -> None:
    case = Case()
    gains = ((case.logprobs().float() - case.reference) * case.weights).detach()
    rewards = 0.1 * torch.stack([part.sum() for part in gains.split(list(LENGTHS))])
    margins = rewards[0::2] - rewards[1::2]
    expected = {
        "chosen_reward": rewards[0::2].mean(),
        "rejected_reward": rewards[1::2].mean(),
        "margin": margins.mean(),
        "accuracy": (margins > 0).float().mean(),
    }
    assert described("dpo", normaliser=3.0) == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-5)


def at(index: int, value: float) -> Tensor:
    values = torch.zeros(TOKENS)
    values[index] = value
    return values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": (5, 3)}, r"lengths add up to 8 where logprobs has 24"),
        ({"lengths": (TOKENS, 0)}, r"lengths .*at least 1"),
        ({"weights": torch.ones(3)}, r"weights has shape \[3\] where logprobs has \[24\]"),
        ({"advantages": torch.ones(TOKENS, 1)}, r"advantages has shape \[24, 1\]"),
        ({"old_logprobs": torch.ones(23)}, r"old_logprobs has shape \[23\]"),
        ({"logprobs": torch.zeros(TOKENS, 2)}, r"logprobs has shape \[24, 2\]"),
        ({"normaliser": 0.0}, r"normaliser 0\.0 is not a positive number"),
        ({"normaliser": float("nan")}, r"normaliser nan"),
        ({"weights": 1 - at(3, 3.0)}, r"weights is -2\.0 at token 3"),
        ({"weights": 1 + at(3, float("nan"))}, r"weights is nan at token 3"),
        ({"weights": torch.ones(TOKENS), "advantages": at(5, float("inf"))}, r"advantages is inf at token 5"),
        ({"weights": torch.ones(TOKENS), "old_logprobs": at(6, -float("inf"))}, r"old_logprobs is -inf at token 6"),
        ({"weights": torch.ones(TOKENS), "reference_logprobs": at(7, float("nan"))}, r"reference_logprobs is nan"),
    ],
)
def test_inputs_that_cannot_be_are_refused_by_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Case().inputs(**changes)


def test_log_probabilities_that_are_no_numbers_are_the_models_fault_not_the_callers() -> None:
    with pytest.raises(NonFinite, match=r"logprobs is nan at token 4"):
        Case().inputs(weights=torch.ones(TOKENS), logprobs=at(4, float("nan")))


def test_values_are_not_looked_at_when_told_so() -> None:
    inputs = Case().inputs(weights=torch.ones(TOKENS), logprobs=at(4, float("nan")), check_values=False)
    assert compute_loss("cross_entropy", inputs).loss.isnan()


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("importance_sampling", "old_logprobs"),
        ("importance_sampling", "advantages"),
        ("ppo", "old_logprobs"),
        ("ppo", "advantages"),
        ("dpo", "reference_logprobs"),
    ],
)
def test_a_loss_says_what_it_misses(name: str, missing: str) -> None:
    without: dict[str, Any] = {missing: None}
    with pytest.raises(RequestError, match=f"the loss '{name}' needs {missing}"):
        compute_loss(name, Case().inputs(**without))


def test_dpo_takes_pairs_only() -> None:
    with pytest.raises(RequestError, match="lengths names 3 sequences; dpo takes pairs"):
        compute_loss("dpo", Case().inputs(lengths=(10, 10, 4)))


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(RequestError, match="loss 'mse' is unknown; choose one of .'cross_entropy'"):
        compute_loss("mse", Case().inputs())


@pytest.mark.parametrize(
    "options", [{"clip_low": 1.5}, {"clip_high": -0.1}, {"beta": 0.0}, {"beta": float("nan")}, {"label_smoothing": 0.5}]
)
def test_options_that_cannot_be_are_refused_by_field(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        LossOptions(**options)
