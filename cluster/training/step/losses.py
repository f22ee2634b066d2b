"""Losses as functions of log-probabilities, one per token; how these come from a divided vocabulary is settled below.

Notation: p_t the log-probability of token t under the weights being trained, q_t under those that sampled it
(old_logprobs), r_t under the reference (reference_logprobs), A_t its advantage, w_t its weight, N the normaliser.

    cross_entropy         -sum_t w_t p_t / N
    importance_sampling   -sum_t w_t exp(p_t - q_t) A_t / N
    ppo                   -sum_t w_t min(c_t A_t, clip(c_t, 1 - low, 1 + high) A_t) / N,   c_t = exp(p_t - q_t)
    dpo                   -sum_pairs ((1 - e) log s(b m) + e log s(-b m)) / N,   s the logistic function,
                          m = sum_t w_t (p_t - r_t) over the chosen sequence minus the same over the rejected one

Policy gradient with importance weights: Degris, White and Sutton, arXiv 1205.4839. Clipped: Schulman et al., arXiv
1707.06347, eq. 7. DPO: Rafailov et al., arXiv 2305.18290, eq. 7; with label smoothing e: Mitchell, "A note on DPO with
noisy preferences" (2023).

N belongs to the GLOBAL batch: the sum of its weights (dpo: its number of pairs). So parts of a batch, wherever they are
computed, give terms and gradients that only have to be added. Tokens of weight 0 contribute nothing, whatever their
log-probability. Sums over tokens are the caller's (`LossTerms.terms`), but for those within one sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cluster.training.step.nonfinite_errors import NonFinite
from parallel import exact
from parallel.errors import ConfigError, RequestError


@dataclass(frozen=True, kw_only=True, eq=False)
class LossInputs:
    """What a loss may look at: [T] tensors over the flat tokens of whole sequences, `lengths` their lengths.

    Values are checked on construction, in one transfer from the device; without `check_values` only shapes are.
    """

    logprobs: Tensor
    weights: Tensor
    lengths: tuple[int, ...]
    normaliser: float
    old_logprobs: Tensor | None = None
    advantages: Tensor | None = None
    reference_logprobs: Tensor | None = None
    check_values: bool = True

    def __post_init__(self) -> None:
        if self.logprobs.dim() != 1:
            raise RequestError(f"logprobs has shape {list(self.logprobs.shape)}; give one number per token, flat")
        if min(self.lengths, default=1) < 1 or sum(self.lengths) != len(self.logprobs):
            raise RequestError(
                f"lengths add up to {sum(self.lengths)} where logprobs has {len(self.logprobs)} tokens; give the "
                "length (at least 1) of every sequence"
            )
        if not (math.isfinite(self.normaliser) and self.normaliser > 0.0):
            raise RequestError(
                f"normaliser {self.normaliser} is not a positive number; give the global batch's sum of weights (dpo: "
                "its number of pairs): a batch in which nothing is learned has no loss"
            )
        for name, values in self.given.items():
            if values.shape != self.logprobs.shape:
                raise RequestError(
                    f"{name} has shape {list(values.shape)} where logprobs has {list(self.logprobs.shape)}; give one "
                    "number per token"
                )
        if self.check_values:
            self._check_values()

    @property
    def given(self) -> dict[str, Tensor]:
        """The tensors beside logprobs, by name."""
        names = ("weights", "old_logprobs", "advantages", "reference_logprobs")
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    def _check_values(self) -> None:
        learned = self.weights != 0
        wrong = {name: ~torch.isfinite(values) & learned for name, values in self.given.items()}
        wrong["weights"] = ~torch.isfinite(self.weights) | (self.weights < 0)
        wrong["logprobs"] = ~torch.isfinite(self.logprobs.detach()) & learned
        found = torch.stack([flags.any() for flags in wrong.values()]).tolist()
        for name, is_wrong in zip(wrong, found, strict=True):
            if is_wrong:
                at = int(wrong[name].nonzero()[0])
                value = float(getattr(self, name).detach()[at])
                rule = (
                    "weights are finite and at least 0" if name == "weights" else "learned tokens need finite numbers"
                )
                kind = NonFinite if name == "logprobs" else RequestError  # the model's own, or the caller's
                raise kind(f"{name} is {value} at token {at}; {rule}")

    def learned(self, values: Tensor) -> Tensor:
        """`values` where there is a weight, and 0, with no gradient, elsewhere."""
        return torch.where(self.weights != 0, values.float(), 0.0)

    def need(self, name: str, loss: str) -> Tensor:
        """One of the optional tensors, without what is not learned."""
        values: Tensor | None = getattr(self, name)
        if values is None:
            raise RequestError(f"the loss {loss!r} needs {name}, one number per token; give it with the sequences")
        return self.learned(values)


@dataclass(frozen=True)
class LossTerms:
    """A part's share of the loss: the sum of `terms` (one per token, or per pair), and of what describes it.

    Metrics are means over the global batch once the parts' are added up, as the loss is.
    """

    terms: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def loss(self) -> Tensor:
        return exact.ordered_sum(self.terms)


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """The constants of the losses: PPO's clip range, DPO's beta and label smoothing; of double heads, how many
    sequences in turn are the choices of one question (0: all), the global batch's questions, both losses' weights.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.1
    label_smoothing: float = 0.0
    num_choices: float = 0
    questions: float | None = None
    language_weight: float = 1.0
    choice_weight: float = 1.0

    def __post_init__(self) -> None:
        if not (0.0 <= self.clip_low <= 1.0 and 0.0 <= self.clip_high < math.inf):
            raise ConfigError(
                f"clip_low {self.clip_low} and clip_high {self.clip_high}: ratios are clipped to [1 - clip_low, "
                "1 + clip_high]; give clip_low in [0, 1] and clip_high of at least 0"
            )
        if not 0.0 < self.beta < math.inf:
            raise ConfigError(f"beta {self.beta} is not a positive number; 0.1 is usual")
        if not 0.0 <= self.label_smoothing < 0.5:
            raise ConfigError(
                f"label_smoothing {self.label_smoothing} is not in [0, 0.5): the chosen must be the likelier"
            )


def cross_entropy(inputs: LossInputs, options: LossOptions = LossOptions()) -> LossTerms:
    """The weighted negative log-likelihood."""
    return LossTerms(-_share(inputs, inputs.learned(inputs.logprobs)))


def importance_sampling(inputs: LossInputs, options: LossOptions = LossOptions()) -> LossTerms:
    """The policy gradient of samples drawn with other weights, each token weighted by how likely it is now."""
    log_ratio, advantages = _log_ratio(inputs, "importance_sampling")
    return LossTerms(-_share(inputs, exact.exp(log_ratio) * advantages), _ratio_metrics(inputs, log_ratio))


def ppo(inputs: LossInputs, options: LossOptions = LossOptions()) -> LossTerms:
    """The clipped surrogate; `clip_fraction` counts the tokens whose gradient the clip takes away."""
    log_ratio, advantages = _log_ratio(inputs, "ppo")
    ratio = exact.exp(log_ratio)
    low, high = 1.0 - options.clip_low, 1.0 + options.clip_high
    surrogate = torch.minimum(ratio * advantages, torch.clamp(ratio, low, high) * advantages)
    clipped = ((ratio < low) & (advantages < 0)) | ((ratio > high) & (advantages > 0))
    clip_fraction = exact.ordered_sum(_share(inputs, clipped.float())).detach()
    return LossTerms(-_share(inputs, surrogate), _ratio_metrics(inputs, log_ratio) | {"clip_fraction": clip_fraction})


def dpo(inputs: LossInputs, options: LossOptions = LossOptions()) -> LossTerms:
    """Direct preference optimisation. Sequences come in pairs, the chosen one before the rejected one."""
    if len(inputs.lengths) % 2:
        raise RequestError(
            f"lengths names {len(inputs.lengths)} sequences; dpo takes pairs, chosen then rejected, whole in every part"
        )
    gains = (inputs.learned(inputs.logprobs) - inputs.need("reference_logprobs", "dpo")) * inputs.weights.float()
    rewards = options.beta * _sequence_sums(gains, inputs.lengths)
    margins = rewards[0::2] - rewards[1::2]
    smooth = options.label_smoothing
    terms = -((1.0 - smooth) * exact.log_sigmoid(margins) + smooth * exact.log_sigmoid(-margins)) / inputs.normaliser
    described = {
        "chosen_reward": rewards[0::2],
        "rejected_reward": rewards[1::2],
        "margin": margins,
        "accuracy": (margins > 0).float(),
    }
    return LossTerms(
        terms, {name: exact.ordered_sum(value.detach()) / inputs.normaliser for name, value in described.items()}
    )


LOSSES: Mapping[str, Callable[[LossInputs, LossOptions], LossTerms]] = {
    "cross_entropy": cross_entropy,
    "importance_sampling": importance_sampling,
    "ppo": ppo,
    "dpo": dpo,
}


def compute_loss(name: str, inputs: LossInputs, options: LossOptions = LossOptions()) -> LossTerms:
    """The loss of that name."""
    if name not in LOSSES:
        raise RequestError(f"loss {name!r} is unknown; choose one of {sorted(LOSSES)}")
    return LOSSES[name](inputs, options)


def _share(inputs: LossInputs, values: Tensor) -> Tensor:
    """[T] each token's share of a weighted mean over the global batch."""
    return values * (inputs.weights.float() / inputs.normaliser)


def _log_ratio(inputs: LossInputs, loss: str) -> tuple[Tensor, Tensor]:
    """log(now / when sampled) and the advantages, per token."""
    advantages = inputs.need("advantages", loss)
    return inputs.learned(inputs.logprobs) - inputs.need("old_logprobs", loss), advantages


def _ratio_metrics(inputs: LossInputs, log_ratio: Tensor) -> dict[str, Tensor]:
    """The mean ratio and the estimate of KL(old || now) from Schulman, "Approximating KL divergence" (2020): c - 1 -
    log c.
    """
    log_ratio = log_ratio.detach()
    ratio = exact.exp(log_ratio)
    measures = {"ratio": ratio, "kl": ratio - 1.0 - log_ratio}
    return {name: exact.ordered_sum(_share(inputs, values)) for name, values in measures.items()}


def _sequence_sums(values: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """The sum over each sequence: of its own values only, in their own order, whatever stands beside it."""
    if not lengths:
        return values.new_zeros(0)
    return torch.stack([exact.ordered_sum(part) for part in torch.split(values, list(lengths))])
