"""The padded call of task models against transformers' classes: padding on either side, losses, gradients, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from parallel.errors import RequestError
from parallel.group import Group
from tests.tp_decoders.parity import TOLERANCE, error
from tests.tp_decoders.task_cases import DOUBLE, FAMILIES, LENGTHS, PAD, Case, cases_of, make
from tests.tp_decoders.test_tasks import gradient_errors
from tp_decoders import load
from tp_decoders.task_config import CHOICES, SEQUENCES, SPANS, TOKENS
from tp_decoders.tasks_padded import PaddedTask

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
RELATIVE = ("gpt_neox", "mpt")  # positions do not matter to the reference's left-padded rows
ROWS = len(LENGTHS)


def batch(side: str) -> tuple[Tensor, Tensor]:
    """Ids and mask; the second row ends with a padding token that is a token of it for the mask."""
    ids, mask = torch.full((ROWS, max(LENGTHS)), PAD), torch.zeros((ROWS, max(LENGTHS)), dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        place = slice(0, length) if side == "right" else slice(max(LENGTHS) - length, None)
        ids[row, place] = 1 + (torch.arange(length) * (row + 3)) % 20
        mask[row, place] = 1
    return ids, mask


def calls_of(family: str) -> dict[str, tuple[Case, dict[str, Tensor]]]:
    """By name: a task, and what it is called with."""
    made: dict[str, tuple[Case, dict[str, Tensor]]] = {}
    cases, rng = cases_of(family), torch.Generator().manual_seed(5)
    for side in ("right", "left") if family in RELATIVE else ("right",):
        ids, mask = batch(side)
        inputs = {"input_ids": ids, "attention_mask": mask}
        made[f"single label {side}"] = cases["single label"], {**inputs, "labels": torch.tensor([2, 0, 1])}
        tokens = torch.randint(5, ids.shape, generator=rng).masked_fill(mask == 0, -100)
        made[f"tokens {side}"] = cases["tokens"], {**inputs, "labels": tokens}
    whole = torch.randint(1, 25, (3, 6), generator=rng)
    if family != "gpt_bigcode":
        spans = {"start_positions": torch.tensor([0, 2, 6]), "end_positions": torch.tensor([3, 9, 5])}
        made["spans"] = cases["spans"], {"input_ids": whole, **spans}
    if family == "gpt2":
        ids = torch.randint(1, 25, (2, 2, 6), generator=rng)
        marks = {"mc_token_ids": torch.tensor([[1, 5], [0, 3]]), "mc_labels": torch.tensor([1, 0])}
        made["choices"] = DOUBLE["cls_index"], {"input_ids": ids, "labels": ids, **marks}
        made["one question"] = DOUBLE["last"], {"input_ids": whole, "labels": whole, "mc_labels": torch.tensor([2])}
    return made


def write(family: str, folder: Path) -> None:
    for name, (case, given) in calls_of(family).items():
        torch.manual_seed(len(name))
        model = make(family, case)
        model.save_pretrained(folder / name)
        out = model(**given, output_hidden_states=True)
        (out.loss + (out.get("mc_loss") or 0.0)).backward()
        kept = {key: value.detach() for key, value in out.items() if isinstance(value, Tensor)}
        grads = {key: parameter.grad for key, parameter in model.named_parameters()}
        torch.save(
            {"out": kept, "grads": grads, "last": out.hidden_states[-1].detach()}, folder / name / "reference.pt"
        )


def deviations(group: Group, root: str, family: str) -> dict[str, float]:
    wrong: dict[str, float] = {}
    for name, (case, given) in calls_of(family).items():
        reference = torch.load(Path(root) / name / "reference.pt")
        model = load(Path(root) / name, task=case.task, group=group)
        out = PaddedTask(model)(**given, output_hidden_states=True)  # type: ignore[arg-type]
        assert out.loss is not None and out.hidden_states is not None
        (out.loss + (0.0 if out.mc_loss is None else out.mc_loss)).backward()
        mask = given.get("attention_mask", torch.ones(given["input_ids"].shape, dtype=torch.long)).bool()
        found = gradient_errors(model, reference["grads"])
        for key, expected in reference["out"].items():
            ours = getattr(out, key).detach()
            if expected.shape[: mask.dim()] == mask.shape and case.task == TOKENS:
                ours, expected = ours[mask], expected[mask]
            found[key] = error(ours, expected, expected)
        wrong |= {f"{name}: {what}": value for what, value in found.items() if not value <= TOLERANCE}
    return wrong


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt_neox_japanese"])
def test_padded_calls_equal_transformers(family: str, ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    write(family, tmp_path)
    for size in (1, 2, 3):
        assert ranks(size, deviations, str(tmp_path), family) == [{}] * size, size


def test_padding_on_either_side_gives_what_each_row_gives_alone(tmp_path: Path) -> None:
    for case in (Case(SEQUENCES, {"num_labels": 3}), Case(TOKENS, {"num_labels": 3}), Case(SPANS)):
        make("gpt_neox_japanese", case).save_pretrained(tmp_path / case.task)
        head = PaddedTask(load(tmp_path / case.task, task=case.task))
        for side in ("right", "left"):
            ids, mask = batch(side)
            out = head(ids, attention_mask=mask)
            for row, length in enumerate(LENGTHS):
                own = head(ids[row, mask[row].bool()][None])
                for key in ("logits", "start_logits", "end_logits"):
                    whole, alone = getattr(out, key), getattr(own, key)
                    if whole is not None:
                        part = whole[row] if case.task == SEQUENCES else whole[row, mask[row].bool()]
                        assert torch.equal(part, alone[0]), (case.task, side, row, key, length)


def test_a_span_in_a_padded_row_is_that_of_the_row_alone(tmp_path: Path) -> None:
    make("mpt", Case(SPANS)).save_pretrained(tmp_path)
    head = PaddedTask(load(tmp_path, task=SPANS))
    left, mask = batch("left")
    alone = [head(left[:1], start_positions=torch.tensor([1]), end_positions=torch.tensor([4])).loss]
    alone.append(head(left[2:, 2:], start_positions=torch.tensor([0]), end_positions=torch.tensor([3])).loss)
    both = head(
        left[[0, 2]],
        attention_mask=mask[[0, 2]],
        start_positions=torch.tensor([1, 2]),
        end_positions=torch.tensor([4, 5]),
    ).loss
    torch.testing.assert_close(both, torch.stack([x for x in alone if x is not None]).mean())
    with pytest.raises(RequestError, match="point at padding"):
        head(left, attention_mask=mask, start_positions=torch.tensor([0, 0, 0]), end_positions=torch.tensor([5, 6, 6]))


def test_wrong_calls_are_refused_as_the_reference_refuses_them(tmp_path: Path) -> None:
    config = transformers.GPT2Config(**FAMILIES["gpt2"][1], num_labels=2)
    transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "no pad")
    head = PaddedTask(load(tmp_path / "no pad", task=SEQUENCES))
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with pytest.raises(RequestError, match="batch of 2 rows for a model without a padding token"):
        head(ids)
    assert head(ids[:1]).logits is not None
    with pytest.raises(RequestError, match="start_positions for a model loaded for sequence-classification"):
        head(ids[:1], start_positions=torch.tensor([0]))
    with pytest.raises(RequestError, match="input_ids"):
        head()
    make("gpt2", Case(SEQUENCES, {"num_labels": 2})).save_pretrained(tmp_path / "pad")
    head = PaddedTask(load(tmp_path / "pad", task=SEQUENCES))
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    with pytest.raises(RequestError, match="row 0 is to be judged by column 2, which holds no token"):
        head(ids, attention_mask=mask)
    embeds = torch.randn(2, 3, 24)
    with pytest.raises(RequestError, match="column 2, which holds no token"):
        head(inputs_embeds=embeds, attention_mask=mask)
    assert head(inputs_embeds=embeds).logits is not None
    make("gpt2", DOUBLE["last"]).save_pretrained(tmp_path / "double")
    double = PaddedTask(load(tmp_path / "double", task=CHOICES))
    with pytest.raises(RequestError, match="column 2, which holds no token"):
        double(ids, attention_mask=mask)
