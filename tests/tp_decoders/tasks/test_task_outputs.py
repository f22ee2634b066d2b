"""Every family and task against transformers: outputs, losses, every gradient, at every tensor-parallel size; files."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from parallel.attention.forward_pass import Pass
from parallel.errors import CheckpointError, ConfigError, RequestError
from parallel.ranks.group import Group
from parallel.sharding.rules import rule_of
from tests.tp_decoders.families.parity import TOLERANCE, error
from tests.tp_decoders.tasks.task_cases import (
    FAMILIES,
    MARKS,
    Case,
    cases_of,
    class_name,
    make,
    num_choices,
    write_case,
)
from tp_decoders import load, save
from tp_decoders.convert.rewrite import HuggingFaceSource, rewrite
from tp_decoders.model.decoder import Decoder
from tp_decoders.model.task_config import CHOICES, SEQUENCES, SPANS, TOKENS
from tp_decoders.registry import family_of
from tp_decoders.tasks.task_outputs import (
    TaskOutputs,
    choice_loss,
    language_loss,
    last_rows,
    task_config,
    task_loss,
    task_outputs,
)

NOTHING = 1e-6
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


def run(model: Decoder, case: Case, tokens: Tensor) -> TaskOutputs:
    marks = MARKS if case.options.get("summary_type") == "cls_index" else None
    return task_outputs(model, tokens, Pass.packed(case.lengths), marks)


def loss_of(model: Decoder, case: Case, outputs: TaskOutputs, tokens: Tensor, labels: Tensor) -> Tensor:
    if outputs.choices is None:
        return task_loss(task_config(model), outputs.logits, labels, case.lengths)
    language = language_loss(model, outputs.logits, tokens, case.lengths)
    return language + 0.5 * choice_loss(outputs.choices, num_choices(case), labels)


def deviations(group: Group, root: str, family: str) -> dict[str, float]:
    """Of all of a family's cases on this rank, by case and what was compared; those beyond the tolerance."""
    wrong: dict[str, float] = {}
    for name, case in cases_of(family).items():
        folder = Path(root) / name
        reference = torch.load(folder / "reference.pt")
        model = load(folder, task=case.task, group=group)
        outputs = run(model, case, reference["tokens"])
        loss = loss_of(model, case, outputs, reference["tokens"], reference["labels"])
        loss.backward()
        found = {"loss": error(loss.detach(), reference["loss"], reference["loss"])}
        found |= output_errors(model, outputs, reference["outputs"])
        found |= gradient_errors(model, reference["grads"])
        wrong |= {f"{name}: {what}": value for what, value in found.items() if not value <= TOLERANCE}
    return wrong


def output_errors(model: Decoder, outputs: TaskOutputs, expected: dict[str, Tensor]) -> dict[str, float]:
    logits = outputs.logits.detach()
    if outputs.choices is None:
        return {"logits": error(logits, expected["logits"], expected["logits"])}
    choices = outputs.choices.detach().view(expected["choices"].shape)
    return {
        "logits": error(model.head.gather(logits), expected["logits"], expected["logits"]),
        "choices": error(choices, expected["choices"], expected["choices"]),
    }


def gradient_errors(model: Decoder, grads: dict[str, Tensor]) -> dict[str, float]:
    names, found = family_of(model.config.model_type).names, {}
    for ours, parameter in model.named_parameters():
        name, theirs = names.theirs(ours)
        full = grads[theirs].t() if name.transposed else grads[theirs]
        assert parameter.grad is not None, f"{ours} has no gradient"
        # 0 but for rounding where a softmax over places or choices does not see what is added to all of them
        scale = full if float(full.abs().max()) > NOTHING else torch.ones(())
        found[ours] = error(parameter.grad, rule_of(parameter).take(full, model.group.rank), scale)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_losses_and_all_gradients_equal_the_reference(
    family: str, ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    for name in cases_of(family):
        write_case(family, name, tmp_path / name)
    for size in (1, 2, 3):
        for rank, wrong in enumerate(ranks(size, deviations, str(tmp_path), family)):
            assert wrong == {}, f"tp {size}, rank {rank}"


def saved_and_counted(group: Group, root: str, family: str) -> list[str]:
    """Saves each case's model; says for which the head cost a collective or another task's memory."""
    dear = []
    for name, case in cases_of(family).items():
        model = load(Path(root) / name, task=case.task, group=group)
        tokens = torch.load(Path(root) / name / "reference.pt")["tokens"]
        assert group.comm is not None
        before = Counter(group.comm.counts)
        model.states(tokens, Pass.packed(case.lengths))
        alone = Counter(group.comm.counts) - before
        run(model, case, tokens)
        if Counter(group.comm.counts) - before != alone + alone or model.has_vocabulary != (case.task == CHOICES):
            dear.append(name)
        save(model, Path(root) / f"{name} saved")
    return dear


def _tensors(output: Any) -> list[Tensor]:
    return [value for value in output.values() if isinstance(value, Tensor)]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_opens_in_transformers_and_heads_cost_no_collective(
    family: str, ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    for name in cases_of(family):
        write_case(family, name, tmp_path / name)
    assert ranks(2, saved_and_counted, str(tmp_path), family) == [[], []]
    for name, case in cases_of(family).items():
        folder = tmp_path / f"{name} saved"
        config = json.loads((folder / "config.json").read_text())
        assert config["architectures"] == [class_name(family, case)]
        opened, given = map(transformers.AutoConfig.from_pretrained, (folder, tmp_path / name))
        assert (opened.num_labels, opened.problem_type) == (given.num_labels, given.problem_type)
        kind = getattr(transformers, class_name(family, case), None)
        if kind is not None:
            (back, notes), (original, _) = (
                kind.from_pretrained(path, output_loading_info=True) for path in (folder, tmp_path / name)
            )
            assert not any(notes.values()), notes
            ids = torch.tensor([[3, 4, 5]])
            assert all(map(torch.equal, _tensors(back(ids)), _tensors(original(ids)))), name
        again = load(folder, task=case.task)
        first = load(tmp_path / name, task=case.task)
        for (key, ours), (_, theirs) in zip(again.named_parameters(), first.named_parameters(), strict=True):
            assert torch.equal(ours, theirs), (name, key)


def test_the_last_token_that_is_no_padding_decides_wherever_the_padding_stands() -> None:
    tokens = torch.tensor([5, 0, 6, 0, 0, 7, 0, 0, 0, 0, 9])
    assert last_rows(tokens, (5, 3, 2, 1), 0).tolist() == [2, 5, 8, 10]
    assert last_rows(tokens, (5, 3, 2, 1), None).tolist() == [4, 7, 9, 10]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_language_model_gets_a_new_head_and_says_so(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, base = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**base, tie_word_embeddings=False)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        model = load(tmp_path, task=SEQUENCES, labels=("bad", "good", "unsure"), problem="single_label_classification")
    assert "score.weight made anew" in caplog.text and "left out" in caplog.text
    assert task_config(model).labels == ("bad", "good", "unsure") and not model.has_vocabulary
    assert float(model.state_dict()["task_head.score.weight"].std()) == pytest.approx(0.02, rel=0.5)
    save(model, tmp_path / "out")
    again = load(tmp_path / "out", task=SEQUENCES)
    assert task_config(again) == task_config(model)
    with pytest.raises(CheckpointError, match="task='sequence-classification'"):
        load(tmp_path / "out")
    with pytest.raises(ConfigError, match="no vocabulary head"):
        model(torch.tensor([1, 2]), Pass.packed((2,)))


def test_a_checkpoint_with_a_head_is_converted_with_it(tmp_path: Path) -> None:
    make("gpt_neox_japanese", Case(TOKENS, {"num_labels": 3})).save_pretrained(tmp_path / "japanese")
    make("gpt2", Case(CHOICES)).save_pretrained(tmp_path / "gpt2")
    for name, task in (("gpt2", CHOICES), ("japanese", TOKENS)):
        if name == "japanese":  # no class of transformers writes its architecture
            save(load(tmp_path / name, task=task), tmp_path / f"{name} named")
        source = tmp_path / (name if name == "gpt2" else f"{name} named")
        with ExitStack() as stack:
            read = HuggingFaceSource(source, stack)
            rewrite(read, read.config, tmp_path / f"{name} converted", max_shard_size=5000)
        before, after = load(source, task=task), load(tmp_path / f"{name} converted", task=task)
        for (key, ours), (_, theirs) in zip(before.named_parameters(), after.named_parameters(), strict=True):
            assert torch.equal(ours, theirs), key


def test_what_cannot_be_is_refused_with_what_to_do(tmp_path: Path) -> None:
    make("mpt", Case(SPANS)).save_pretrained(tmp_path / "mpt")
    with pytest.raises(ConfigError, match="of a mpt is not supported, only of gpt2; choose one of causal-lm, "):
        load(tmp_path / "mpt", task=CHOICES)
    with pytest.raises(ConfigError, match="choose one of causal-lm, "):
        load(tmp_path / "mpt", task="translation")
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**FAMILIES["gpt2"][1], summary_type="attn")).save_pretrained(
        tmp_path / "gpt2"
    )
    with pytest.raises(ConfigError, match="summary_type = 'attn' is not supported"):
        load(tmp_path / "gpt2", task=CHOICES)
    model = load(tmp_path / "mpt", task=TOKENS, labels=4)
    with pytest.raises(RequestError, match="one class id each"):
        task_loss(task_config(model), torch.zeros(3, 4), torch.zeros(2, dtype=torch.long), (3,))
    with pytest.raises(RequestError, match="make up"):
        task_outputs(model, torch.tensor([1, 2]), Pass.packed((3,)))
    with pytest.raises(CheckpointError, match="of another shape"):
        make("mpt", Case(TOKENS, {"num_labels": 5})).save_pretrained(tmp_path / "five")
        load(tmp_path / "five", task=TOKENS, labels=4)
