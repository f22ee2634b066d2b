"""The tasks' oracle: transformers' models by family and task, their outputs, losses and gradients, written to a folder.

What no class of transformers has (every task of GPT-NeoX-Japanese, spans of GPT-BigCode) is its base model and a linear
layer. Batches are padded on the right; spans and choices have sequences of one length, because the reference's softmax
over places runs over its padding, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from tests.tp_decoders.families.dense_mpt import random_weight
from tests.tp_decoders.families.parity import GPT2, JAPANESE, LLAMA, MPT, NEOX, hash_of
from tp_decoders.model.task_config import CHOICES, SEQUENCES, SPANS, TOKENS

LENGTHS, EVEN = (7, 1, 5), (6, 6, 6, 6)
PAD = 0
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {**GPT2, "n_head": 3}),
    "gpt_neox": ("GPTNeoX", NEOX),
    "gpt_neox_japanese": ("GPTNeoXJapanese", JAPANESE),
    "mpt": ("Mpt", MPT),
    "gpt_bigcode": ("GPTBigCode", GPT2),
    "llama": ("Llama", LLAMA),
}
ENDINGS = {SEQUENCES: "SequenceClassification", TOKENS: "TokenClassification", SPANS: "QuestionAnswering"}


@dataclass(frozen=True)
class Case:
    """One task with its options; labels are drawn as the problem wants them."""

    task: str
    options: dict[str, Any] = field(default_factory=dict)
    floats: bool = False  # labels are numbers, one per label

    @property
    def lengths(self) -> tuple[int, ...]:
        return EVEN if self.task in (SPANS, CHOICES) else LENGTHS


COMMON = {
    "single label": Case(SEQUENCES, {"num_labels": 3}),
    "multi-label": Case(SEQUENCES, {"num_labels": 3}, floats=True),
    "multi-label by name": Case(SEQUENCES, {"num_labels": 4, "problem_type": "multi_label_classification"}, True),
    "regression": Case(SEQUENCES, {"num_labels": 1}, floats=True),
    "regression of two": Case(SEQUENCES, {"num_labels": 2, "problem_type": "regression"}, floats=True),
    "tokens": Case(TOKENS, {"num_labels": 5, "classifier_dropout": 0.0}),
    "spans": Case(SPANS),
}
DOUBLE = {
    "last": Case(CHOICES, {"summary_type": "last"}),
    "first": Case(CHOICES, {"summary_type": "first", "summary_activation": "tanh"}),
    "mean": Case(CHOICES, {"summary_type": "mean"}),
    "cls_index": Case(CHOICES, {"summary_type": "cls_index"}),
    "no projection": Case(CHOICES, {"summary_use_proj": False, "summary_type": "mean"}),
    "projection to states": Case(CHOICES, {"summary_proj_to_labels": False, "summary_activation": "gelu_new"}),
}


def cases_of(family: str) -> dict[str, Case]:
    shared = {name: case for name, case in COMMON.items() if family != "llama" or case.task != SPANS}
    return shared | (DOUBLE if family == "gpt2" else {})


class Plain(nn.Module):
    """transformers' base model and a linear layer: the oracle where it has no class of its own."""

    def __init__(self, base: nn.Module, prefix: str, head: str, width: int, bias: bool) -> None:
        super().__init__()
        config: Any = base.config
        self.config = config
        self.prefix, self.head = prefix, head
        setattr(self, prefix, base)
        setattr(self, head, nn.Linear(config.hidden_size, width, bias=bias))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        states = getattr(self, self.prefix)(input_ids, attention_mask=attention_mask).last_hidden_state
        return getattr(self, self.head)(states)  # type: ignore[no-any-return]

    def save_pretrained(self, folder: Path) -> None:
        self.config.save_pretrained(folder)
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, str(folder / "model.safetensors"))


def class_name(family: str, case: Case) -> str:
    name = FAMILIES[family][0]
    return f"{name}DoubleHeadsModel" if case.task == CHOICES else f"{name}For{ENDINGS[case.task]}"


def make(family: str, case: Case) -> Any:
    """A tiny reference model with random weights, in eval mode."""
    name, base = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**base, "pad_token_id": PAD, **case.options})
    config._attn_implementation = "eager"
    kind = getattr(transformers, class_name(family, case), None)
    if kind is not None:
        model = kind(config)
    else:
        prefix = "gpt_neox_japanese" if "japanese" in family else "transformer"
        head = {SEQUENCES: "score", TOKENS: "classifier", SPANS: "qa_outputs"}[case.task]
        width = 2 if case.task == SPANS else config.num_labels
        plain = transformers.AutoModel.from_config(config)
        model = Plain(plain, prefix, head, width, case.task != SEQUENCES)
    for key, parameter in model.named_parameters():
        parameter.data = random_weight(key, tuple(parameter.shape))
    return model.eval()


def labels_for(case: Case, vocab: int, model: Any) -> Tensor:
    num, sequences = model.config.num_labels, len(case.lengths)
    if case.task == SPANS:
        return torch.tensor([[1, 4], [0, 5], [-3, 2], [5, 9]])  # below the first, and past the last token
    if case.task == CHOICES:
        return choice_labels(case)
    if case.task == TOKENS:
        labels = torch.randint(num, (sum(case.lengths),))
        labels[2] = -100
        return labels
    if not case.floats:
        return torch.randint(num, (sequences,))
    shape = (sequences,) if num == 1 else (sequences, num)
    return (
        torch.rand(shape) if "regression" in str(model.config.problem_type) or num == 1 else torch.rand(shape).round()
    )


def write_case(family: str, name: str, folder: Path) -> None:
    """The case's checkpoint and, beside it, what the reference makes of a batch."""
    case = cases_of(family)[name]
    torch.manual_seed(hash_of(f"{family} {name}"))
    model = make(family, case)
    model.save_pretrained(folder)
    tokens = torch.randint(1, model.config.vocab_size, (sum(case.lengths),))
    labels = labels_for(case, model.config.vocab_size, model)
    outputs, loss = (_choices if case.task == CHOICES else _labelled)(model, case, tokens, labels)
    loss.backward()
    grads = {key: parameter.grad for key, parameter in model.named_parameters()}
    content = {"tokens": tokens, "labels": labels, "loss": loss.detach(), "grads": grads, "outputs": outputs}
    torch.save(content, folder / "reference.pt")


def _labelled(model: Any, case: Case, tokens: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    parts = tokens.split(case.lengths)
    ids = nn.utils.rnn.pad_sequence(list(parts), batch_first=True, padding_value=PAD)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(part) for part in parts], batch_first=True)
    if isinstance(model, Plain):
        logits, loss = _plain(model, case, ids, mask, labels)
    elif case.task == SPANS:
        out = model(ids, attention_mask=mask, start_positions=labels[:, 0], end_positions=labels[:, 1])
        logits, loss = torch.stack([out.start_logits, out.end_logits], -1), out.loss
    else:
        out = model(ids, attention_mask=mask, labels=_padded(case, labels))
        logits, loss = out.logits, out.loss
    return {"logits": (logits if case.task == SEQUENCES else logits[mask.bool()]).detach()}, loss


def _padded(case: Case, labels: Tensor) -> Tensor:
    if case.task != TOKENS:
        return labels
    return nn.utils.rnn.pad_sequence(list(labels.split(case.lengths)), batch_first=True, padding_value=-100)


def _plain(model: Plain, case: Case, ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The reference's losses, written out."""
    logits = model(ids, mask)
    if case.task == SPANS:
        starts, ends = labels.clamp(0, ids.shape[1]).unbind(1)
        halves = [
            functional.cross_entropy(logits[..., i], places, ignore_index=ids.shape[1])
            for i, places in enumerate((starts, ends))
        ]
        return logits, (halves[0] + halves[1]) / 2
    if case.task == TOKENS:
        return logits, functional.cross_entropy(logits.flatten(0, 1), _padded(case, labels).flatten())
    pooled = logits[torch.arange(len(ids)), mask.sum(1) - 1]
    if not case.floats:
        return pooled, functional.cross_entropy(pooled, labels)
    if model.config.problem_type == "regression" or pooled.shape[1] == 1:
        return pooled, functional.mse_loss(pooled.view(labels.shape), labels)
    return pooled, functional.binary_cross_entropy_with_logits(pooled, labels)


MARKS = torch.tensor([2, 5, 0, 3])


def num_choices(case: Case) -> int:
    """Of each question. The reference's other summaries than cls_index are per sequence only where the batch has two
    axes, all of its sequences then being choices of one question; with three they run over the choices.
    """
    return 2 if case.options.get("summary_type") == "cls_index" else 4


def choice_labels(case: Case) -> Tensor:
    scalar = case.options.get("summary_use_proj", True) and case.options.get("summary_proj_to_labels", True)
    return torch.tensor([1, 0, 3][: 4 // num_choices(case)] if scalar else [3, 1, 0, 2])


def _choices(model: Any, case: Case, tokens: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Questions and their choices; both losses, the second one's weight not 1."""
    ids = tokens.view(4, -1)
    shaped = ids.view(2, 2, -1) if num_choices(case) == 2 else ids
    marks = MARKS.view(2, 2) if num_choices(case) == 2 else None
    out = model(shaped, mc_token_ids=marks, labels=shaped, mc_labels=labels)
    outputs = {"logits": out.logits.flatten(0, -2).detach(), "choices": out.mc_logits.detach().view(4, -1)}
    return outputs, out.loss + 0.5 * out.mc_loss
