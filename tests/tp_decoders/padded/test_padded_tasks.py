"""Padded calls of the task heads against transformers: padding on either side, head masks, every output and loss.

What transformers has no class for (NeoX-Japanese, BigCode's spans) is its base model and a linear layer: see
task_cases.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from parallel.errors import ConfigError, RequestError
from parallel.ranks.group import Group
from parallel.sharding.rules import rule_of
from tests.tp_decoders.families.parity import TOLERANCE, error, hash_of
from tests.tp_decoders.padded.padded_cases import SIZES, generate_positions
from tests.tp_decoders.tasks.task_cases import FAMILIES, PAD, Case, Plain, cases_of, make
from tp_decoders import load
from tp_decoders.model.decoder import Decoder
from tp_decoders.model.task_config import CHOICES, SEQUENCES, SPANS, TOKENS
from tp_decoders.padded.padded_tasks import ChoicesOutput, PaddedTask, SpanOutput
from tp_decoders.registry import family_of

# importing transformers' GPT-BigCode warns
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

ROWS, TIME = 4, 6
WATCHED: dict[str, Any] = {"output_attentions": True, "output_hidden_states": True}
NOTHING = 1e-6  # what a softmax does not see has a gradient of rounding errors
PLAIN = ("single label", "tokens", "spans")
CHOICE = ("cls_index", "projection to states")


def names_of(family: str) -> list[str]:
    """Those whose reference does not take choices for places (task_cases), and those it can be built for by hand."""
    chosen = [name for name, case in cases_of(family).items() if case.task != CHOICES or name in CHOICE]
    return [name for name in chosen if name in PLAIN] if "japanese" in family else chosen


def call_of(family: str, case: Case, side: str, num_labels: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(hash_of(f"{family} {side}"))
    ids = torch.randint(1, 29, (ROWS, TIME), generator=generator)
    mask = torch.ones(ROWS, TIME, dtype=torch.long)
    if case.task not in (SPANS, CHOICES):
        mask[1, 3:], mask[2, 1:] = 0, 0
    mask = mask.flip(1) if side == "left" else mask
    call = {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}
    return {**call, **labels_of(case, mask, num_labels, generator)}


def labels_of(case: Case, mask: Tensor, num_labels: int, generator: torch.Generator) -> dict[str, Tensor]:
    if case.task == SPANS:
        return {"start_positions": torch.tensor([1, 0, -3, 5]), "end_positions": torch.tensor([4, 5, 2, 9])}
    if case.task == CHOICES:
        ids = torch.randint(29, (2, 2, TIME), generator=generator)
        marks = torch.tensor([[5, 2], [0, 3]])
        right = torch.tensor([1, 0]) if case.options.get("summary_proj_to_labels", True) else marks
        return {"labels": ids, "mc_token_ids": marks, "mc_labels": right}
    if case.task == TOKENS:
        return {"labels": torch.randint(num_labels, mask.shape, generator=generator).masked_fill(mask == 0, -100)}
    if case.floats:
        shape = (ROWS,) if num_labels == 1 else (ROWS, num_labels)
        return {"labels": torch.rand(shape, generator=generator).round()}
    return {"labels": torch.randint(num_labels, (ROWS,), generator=generator)}


def write(family: str, name: str, side: str, folder: Path) -> None:
    case = cases_of(family)[name]
    torch.manual_seed(hash_of(f"{family} {name}"))
    model = make(family, case)
    model.save_pretrained(folder)
    call = call_of(family, case, side, model.config.num_labels)
    if case.task == CHOICES:
        call["input_ids"] = call["input_ids"].view(2, 2, TIME)
        call["attention_mask"] = call["attention_mask"].view(2, 2, TIME)
    out = by_hand(model, case, call) if isinstance(model, Plain) else by_class(model, family, case, call, side)
    total = out["loss"] + out.get("mc_loss", 0.0)
    total.backward()
    grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    torch.save({"call": call, "grads": grads, **out}, folder / "reference.pt")


def by_class(model: Any, family: str, case: Case, call: dict[str, Any], side: str) -> dict[str, Any]:
    theirs, mask = dict(call), call["attention_mask"]
    if side == "left" and family != "mpt":
        theirs["position_ids"] = generate_positions(mask.view(-1, TIME))
    if case.task == CHOICES:
        theirs["attention_mask"] = mask.view(-1, TIME)
    found = model(**theirs, **WATCHED)
    names = ("loss", "mc_loss", "logits", "mc_logits", "start_logits", "end_logits", "hidden_states", "attentions")
    return {name: found[name] for name in names if name in found}


def by_hand(model: Any, case: Case, call: dict[str, Any]) -> dict[str, Any]:
    """Of the linear layer's rows. Positions are relative where padding is on the left."""
    logits, mask = model(call["input_ids"], call["attention_mask"]), call["attention_mask"]
    if case.task == SEQUENCES:
        logits = logits[torch.arange(ROWS), (mask * torch.arange(TIME)).argmax(1)]
        return {"logits": logits, "loss": functional.cross_entropy(logits, call["labels"])}
    if case.task == TOKENS:
        return {"logits": logits, "loss": functional.cross_entropy(logits.flatten(0, 1), call["labels"].flatten())}
    pairs = zip(logits.unbind(2), (call["start_positions"], call["end_positions"]), strict=True)
    losses = [functional.cross_entropy(x, at.clamp(0, TIME), ignore_index=TIME) for x, at in pairs]
    return {"start_logits": logits[..., 0], "end_logits": logits[..., 1], "loss": (losses[0] + losses[1]) / 2}


def deviations(group: Group, root: str, family: str) -> dict[str, float]:
    """Of all of a family's tasks on this rank; those beyond the tolerance."""
    wrong: dict[str, float] = {}
    for name in names_of(family):
        case = cases_of(family)[name]
        reference = torch.load(Path(root) / name / "reference.pt", weights_only=False)
        model = load(Path(root) / name, task=case.task, group=group)
        task, call = PaddedTask(model), {**reference["call"], **WATCHED}
        out = task.choices(**call) if case.task == CHOICES else task(**call)
        assert out.loss is not None
        total = out.loss
        if isinstance(out, ChoicesOutput):
            assert out.mc_loss is not None
            total = total + out.mc_loss
        total.backward()
        found = {**outputs(out, reference), **gradients(model, reference["grads"])}
        wrong |= {f"{name}: {what}": value for what, value in found.items() if not value <= TOLERANCE}
    return wrong


def outputs(out: Any, reference: dict[str, Any]) -> dict[str, float]:
    mask = reference["call"]["attention_mask"].view(-1, TIME)
    errors: dict[str, float] = {}
    for name in ("loss", "mc_loss", "logits", "mc_logits", "start_logits", "end_logits"):
        if name in reference:
            theirs = reference[name].detach()
            here = mask[:, :, None] if name == "logits" and theirs.dim() == 3 else torch.ones(())
            errors[name] = error(getattr(out, name).detach() * here, theirs * here, theirs)
    states = reference.get("hidden_states") or ()
    for i, theirs in enumerate(states):
        flat = theirs.detach().view(-1, *theirs.shape[-2:])
        errors[f"state {i}"] = error(out.hidden_states[i].detach(), flat * mask[:, :, None], flat)
    seen = mask[:, None, :, None] * mask[:, None, None]
    for i, theirs in enumerate(reference.get("attentions") or ()):
        errors[f"attention {i}"] = error(out.attentions[i].detach(), theirs.detach() * seen, theirs.detach())
    if isinstance(out, SpanOutput):
        assert torch.isfinite(out.start_logits).all()
    return errors


def gradients(model: Decoder, grads: dict[str, Tensor]) -> dict[str, float]:
    names, errors = family_of(model.config.model_type).names, {}
    for ours, parameter in model.named_parameters():
        name, theirs = names.theirs(ours)
        if theirs not in grads:
            assert parameter.grad is None or not parameter.grad.any(), ours
            continue
        full = grads[theirs].t() if name.transposed else grads[theirs]
        assert parameter.grad is not None, ours
        scale = full if full.abs().max() > NOTHING else torch.ones(())
        errors[ours] = error(parameter.grad, rule_of(parameter).take(full, model.group.rank), scale)
    return errors


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_outputs_losses_and_gradients_equal_the_reference(
    side: str, family: str, ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    for name in names_of(family):
        write(family, name, side, tmp_path / name)
    for size in SIZES:
        for wrong in ranks(size, deviations, str(tmp_path), family):
            assert not wrong, size


@pytest.fixture
def tasks(tmp_path: Path) -> Callable[..., PaddedTask]:
    def of(name: str, **options: Any) -> PaddedTask:
        case = cases_of("gpt2")[name]
        folder = tmp_path / name.replace(" ", "-")
        make("gpt2", Case(case.task, {**case.options, **options})).save_pretrained(folder)
        return PaddedTask(load(folder, task=case.task))

    return of


def test_answers_do_not_begin_or_end_in_padding(tasks: Callable[..., PaddedTask]) -> None:
    task, ids = tasks("spans"), torch.randint(1, 29, (2, TIME))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0]])
    out = task(ids, attention_mask=mask, start_positions=torch.tensor([1, 2]), end_positions=torch.tensor([2, 4]))
    alone = task(ids[1:, 2:5], start_positions=torch.tensor([0]), end_positions=torch.tensor([2]))
    other = task(ids[:1], start_positions=torch.tensor([1]), end_positions=torch.tensor([2]))
    assert isinstance(out, SpanOutput) and isinstance(alone, SpanOutput)
    assert torch.equal(out.start_logits[1, 2:5], alone.start_logits[0])
    assert torch.isinf(out.start_logits[mask == 0]).all() and torch.isinf(out.end_logits[mask == 0]).all()
    assert out.loss is not None and alone.loss is not None and other.loss is not None
    assert torch.isclose(out.loss, (alone.loss + other.loss) / 2)


def test_wrong_calls_of_heads_are_refused(tasks: Callable[..., PaddedTask]) -> None:
    ids = torch.randint(1, 29, (2, TIME))
    gaps = torch.tensor([[1] * 6, [0] * 3 + [1] * 3])
    sequences, tokens, spans = tasks("single label", pad_token_id=None), tasks("tokens"), tasks("spans")
    double = tasks("cls_index")
    assert sequences(ids[:1]).to_tuple()
    refusals: list[tuple[Callable[[], Any], str]] = [
        (lambda: sequences(ids), "a batch of 2 rows for a model without pad_token_id"),
        (lambda: tokens(ids, attention_mask=gaps, labels=ids * 0), "labels on padding"),
        (lambda: tokens(ids, attention_mask=gaps * torch.tensor([[1], [0]])), "a row without a token"),
        (lambda: spans(ids, attention_mask=gaps, start_positions=ids[:, 0] * 0, end_positions=ids[:, 0] * 0 + 4),
         "not where a token is"),
        (lambda: double.choices(ids[None], mc_token_ids=torch.tensor([[1, 6]])), "not where a token is"),
        (lambda: double.choices(ids[None], mc_token_ids=torch.tensor([[1]])), "1 times mc_token_ids for 2 rows"),
    ]  # fmt: skip
    for call, said in refusals:
        with pytest.raises(RequestError) as caught:
            call()
        assert said in str(caught.value)
    with pytest.raises(ConfigError, match="call `choices`"):
        double(ids)
    with pytest.raises(ConfigError, match="no double heads"):
        spans.choices(ids)
