"""Heads in the trainer: losses and gradients in parts equal transformers' for every task; steps that learn; dropout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cluster.training.service.call_batch import batch_of
from cluster.training.step.losses import LossOptions
from cluster.training.step.trainer import Trainer, TrainerConfig
from cluster.training.train_calls import CROSS_ENTROPY, TASK, Kind, TrainCall, TrainSequence
from parallel.attention.forward_pass import Pass
from parallel.errors import ConfigError, RequestError
from parallel.layers.dropout import HEAD, Dropping, Odds, token_keys
from parallel.options import Recompute
from parallel.ranks.group import Group
from parallel.ranks.mesh import Groups
from parallel.sharding.rules import rule_of
from tests.tp_decoders.families.parity import TOLERANCE, error
from tests.tp_decoders.tasks.task_cases import MARKS, Case, cases_of, num_choices, write_case
from tp_decoders import load
from tp_decoders.model.task_config import CHOICES, SEQUENCES, SPANS, TOKENS
from tp_decoders.registry import family_of
from tp_decoders.tasks.task_outputs import task_config, task_outputs

NOTHING = 1e-6
CASES = ("single label", "multi-label", "regression of two", "tokens", "spans", "cls_index", "mean")


def sequences_of(case: Case, reference: dict[str, torch.Tensor]) -> tuple[TrainSequence, ...]:
    """A case's batch as a training client sends it."""
    parts, labels = reference["tokens"].split(case.lengths), reference["labels"]
    made = []
    for i, part in enumerate(parts):
        own = TrainSequence(token_ids=tuple(part.tolist()))
        if case.task == TOKENS:
            own = replace(own, labels=tuple(labels.split(case.lengths)[i].tolist()))
        elif case.task == CHOICES:
            size = num_choices(case)
            mark = int(MARKS[i]) if case.options.get("summary_type") == "cls_index" else None
            own = replace(own, chosen=int(labels[i // size]) == i % size, mark=mark)
        elif case.floats:
            own = replace(own, values=tuple(labels[i].view(-1).tolist()))
        else:
            own = replace(own, labels=tuple(labels[i].view(-1).tolist()))
        made.append(own)
    return tuple(made)


def call_of(case: Case, reference: dict[str, torch.Tensor], **given: Any) -> TrainCall:
    options = {"num_choices": num_choices(case), "choice_weight": 0.5} if case.task == CHOICES else {}
    return TrainCall(
        kind=Kind.TRAIN_STEP, loss=TASK, sequences=sequences_of(case, reference), loss_options=options, **given
    )


def deviations(group: Group, root: str, micro_batch_tokens: int | None) -> dict[str, float]:
    """Of every case's loss and gradients, summed over micro-batches, on this rank."""
    wrong: dict[str, float] = {}
    for name in CASES:
        case, folder = cases_of("gpt2")[name], Path(root) / name
        reference = torch.load(folder / "reference.pt")
        model = load(folder, task=case.task, group=group)
        config = TrainerConfig(micro_batch_tokens=micro_batch_tokens)
        trainer = Trainer(model, Groups(group, Group.single()), config)
        call = call_of(case, reference)
        options = LossOptions(**call.loss_options)
        done = trainer.forward_backward(batch_of(call, "cpu", task_config(model), options), TASK, options)
        found = {"loss": abs(done.loss - float(reference["loss"])) / float(reference["loss"])}
        names = family_of("gpt2").names
        for flat in trainer.optimizer.flats:
            for ours in flat.parameters:
                line, theirs = names.theirs(ours)
                full = reference["grads"][theirs].t() if line.transposed else reference["grads"][theirs]
                scale = full if float(full.abs().max()) > NOTHING else torch.ones(())
                own = rule_of(flat.parameters[ours]).take(full, group.rank)
                found[ours] = error(flat.view(flat.grad, ours), own, scale)
        wrong |= {f"{name}: {what}": value for what, value in found.items() if not value <= TOLERANCE}
    return wrong


def test_losses_and_gradients_in_parts_equal_the_reference(ranks: Any, tmp_path: Path) -> None:
    for name in CASES:
        write_case("gpt2", name, tmp_path / name)
    for size, tokens in ((1, None), (1, 6), (2, 13)):
        assert ranks(size, deviations, str(tmp_path), tokens) == [{}] * size, (size, tokens)


def shared_out(group: Group, root: str, recompute: Recompute) -> dict[str, tuple[float, float]]:
    """Losses and gradient norms of a step with dropout, tokens divided over the ranks."""
    found, group = {}, replace(group, sequence_parallel=True)
    for name in CASES:
        case, folder = cases_of("gpt2")[name], Path(root) / name
        model = load(folder, task=case.task, group=group)
        trainer = Trainer(model, Groups(group, Group.single()), TrainerConfig(recompute=recompute))
        call = call_of(case, torch.load(folder / "reference.pt"))
        options = LossOptions(**call.loss_options)
        batch = batch_of(call, "cpu", task_config(model), options)
        done = trainer.forward_backward(batch, TASK, options, dropout_seed=3)
        found[name] = done.loss, trainer.optim_step(1e-3).grad_norm
    return found


def test_tokens_divided_over_ranks_and_recomputed_give_the_same_bits(ranks: Any, tmp_path: Path) -> None:
    for name in CASES:
        write_case("gpt2", name, tmp_path / name)
    (one,) = ranks(1, shared_out, str(tmp_path), "none")
    assert ranks(2, shared_out, str(tmp_path), "full") == [one, one]
    assert ranks(3, shared_out, str(tmp_path), "selective") == [one, one, one]


def learned(group: Group, folder: str, task: str) -> list[float]:
    """Losses of a few steps, the accuracy before and after them."""
    model = load(folder, task=task, group=group, labels=2)
    trainer = Trainer(model, Groups(group, Group.single()), TrainerConfig(micro_batch_tokens=16))
    generator, sequences = torch.Generator().manual_seed(3), []
    for i in range(16):  # of class 1 are the sequences, or tokens, with large ids
        ids = torch.randint(1, 15, (5,), generator=generator) + 15 * (i % 2)
        labels = (i % 2,) if task == SEQUENCES else tuple((ids >= 15).long().tolist())
        sequences.append(TrainSequence(token_ids=tuple(ids.tolist()), labels=labels))
    call = TrainCall(kind=Kind.TRAIN_STEP, loss=TASK, sequences=tuple(sequences))
    batch, found = batch_of(call, "cpu", task_config(model)), []
    for step in range(12):
        found.append(trainer.forward_backward(batch, TASK, dropout_seed=step).loss)
        trainer.optim_step(3e-3)
    return [*found, trainer.evaluate(batch, TASK).metrics["accuracy"]]


@pytest.mark.parametrize("task", [SEQUENCES, TOKENS])
def test_steps_learn_the_labels_alike_on_one_and_two_ranks(task: str, ranks: Any, tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=31, n_positions=32, n_embd=24, n_layer=2, n_head=3)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    (one,) = ranks(1, learned, str(tmp_path), task)
    assert ranks(2, learned, str(tmp_path), task) == [one, one], "the same bits on two ranks"
    assert one[-1] == 1.0 and one[11] < 0.5 * one[0], one


def test_dropout_before_the_classifier_is_drawn_by_token_and_left_out_without_a_seed(tmp_path: Path) -> None:
    options = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "classifier_dropout": 0.4}
    config = transformers.GPT2Config(
        vocab_size=31, n_positions=32, n_embd=24, n_layer=2, n_head=3, num_labels=3, **options
    )
    reference = transformers.GPT2ForTokenClassification(config).eval()
    reference.save_pretrained(tmp_path)
    model, tokens = load(tmp_path, task=TOKENS), torch.arange(1, 8)
    dropping = Dropping(5, token_keys([0], [7]))
    states = reference.transformer(tokens[None]).last_hidden_state[0]
    factors = Odds(0.4).factors(dropping.site_keys(2, HEAD), torch.arange(24))
    found = task_outputs(model, tokens, Pass.packed((7,), dropping=dropping))
    torch.testing.assert_close(found.logits, reference.classifier(states * factors), rtol=1e-4, atol=1e-5)
    plain = task_outputs(model, tokens, Pass.packed((7,)))
    torch.testing.assert_close(plain.logits, reference.classifier(states), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="says no masks"):
        task_outputs(model.train(), tokens, Pass.packed((7,)))


def test_both_dropouts_of_a_summary_are_drawn_by_the_row_that_stands_for_the_sequence(tmp_path: Path) -> None:
    options = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "summary_proj_to_labels": False}
    drops = {"summary_first_dropout": 0.4, "summary_last_dropout": 0.3, "summary_activation": "tanh"}
    config = transformers.GPT2Config(vocab_size=31, n_positions=32, n_embd=24, n_layer=2, n_head=3, **options, **drops)
    reference = transformers.GPT2DoubleHeadsModel(config).eval()
    reference.save_pretrained(tmp_path)
    model, tokens = load(tmp_path, task=CHOICES), torch.arange(1, 8)
    dropping = Dropping(5, token_keys([0], [7]))
    first, last = (
        Odds(p).factors(dropping.site_keys(layer, HEAD)[4:5], torch.arange(24)) for p, layer in ((0.4, 2), (0.3, 3))
    )
    states = reference.transformer(tokens[None]).last_hidden_state[0, 4:5]
    expected = torch.tanh(reference.multiple_choice_head.summary(states * first)) * last
    found = task_outputs(model, tokens, Pass.packed((7,), dropping=dropping), torch.tensor([4]))
    assert found.choices is not None
    torch.testing.assert_close(found.choices, expected, rtol=1e-4, atol=1e-5)


def test_a_head_has_its_own_loss_and_a_language_model_none(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=31, n_positions=32, n_embd=24, n_layer=1, n_head=3)
    transformers.GPT2ForQuestionAnswering(config).save_pretrained(tmp_path)
    model = load(tmp_path, task=SPANS)
    call = TrainCall(kind=Kind.TRAIN_STEP, loss=TASK, sequences=(TrainSequence(token_ids=(1, 2, 3), labels=(0, 1)),))
    with pytest.raises(RequestError, match="on a language model"):
        batch_of(call, "cpu", None)
    trainer = Trainer(model, Groups(Group.single(), Group.single()), TrainerConfig())
    with pytest.raises(ConfigError, match="no vocabulary head"):
        trainer.evaluate(batch_of(replace(call, loss=CROSS_ENTROPY), "cpu"), CROSS_ENTROPY)
