"""Training and generation in one command stream on several ranks: the same bits as on one, and refusals end no rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.engine.engine import Engine
from cluster.engine.engine_builder import build_engine, build_runner
from cluster.engine.engine_config import EngineConfig
from cluster.engine.request import Request, ResponseOptions, SamplingParams, StoppingCriteria
from cluster.engine.run.command_stream import Commands
from cluster.engine.run.executors import follow
from cluster.engine.run.model_runner import ModelRunner
from cluster.training.service.train_coordinator import TrainCoordinator
from cluster.training.service.train_worker import TrainWorker
from cluster.training.train_calls import (
    InParts,
    Kind,
    Later,
    NotApplied,
    StepConflict,
    TrainAnswer,
    TrainCall,
    TrainSequence,
)
from parallel.errors import RequestError
from parallel.ranks.group import Group
from parallel.ranks.mesh import Groups
from tests.cluster.engine.tiny_models import CONFIGS, DROPOUTS, save_tiny
from tp_decoders import load

DOCUMENTS = (TrainSequence(token_ids=(5, 9, 2, 7, 11, 3, 8)), TrainSequence(token_ids=(1, 4, 4, 6, 90)))
FINE = TrainSequence(token_ids=(1, 2), old_logprobs=(-3.0,), advantages=(1.0,))
BAD = TrainSequence(token_ids=(1, 2), old_logprobs=(-80.0,), advantages=(1e38,))
CONFIG = EngineConfig(kv_blocks=64, max_sequences=8)
STEPS = 6


SINGLE = Groups(Group.single(), Group.single())


def runner_of(folder: str) -> ModelRunner:
    return build_runner(load(folder), CONFIG, 1 << 28)


def step_call(step: int, **fields: Any) -> TrainCall:
    given = {
        "kind": Kind.TRAIN_STEP,
        "sequences": DOCUMENTS,
        "expected_step": step,
        "optimizer": {"learning_rate": 1e-3},
    }
    return TrainCall(**{**given, **fields})


def at_once(outcome: TrainAnswer | Later | InParts) -> TrainAnswer:
    """All parts of a call, one after the other."""
    while isinstance(outcome, InParts):
        outcome = outcome.advance() or outcome
    assert isinstance(outcome, TrainAnswer)
    return outcome


def serve_and_train(group: Group, folder: str) -> Any:
    """Rank 0: everything that was answered; the others follow."""
    runner = build_runner(load(folder, group=group), CONFIG, 1 << 28)
    commands = Commands(group.comm, 30.0)
    side = TrainWorker(runner, Groups(group, Group.single()))
    if group.rank > 0:
        follow(runner, commands, side.handlers)
        return None
    engine = build_engine(runner, CONFIG, (), commands if group.size > 1 else None)
    lead = TrainCoordinator(side, commands, engine.weights_changed)
    answers = drive(engine, lead)
    engine.close()
    return answers


def drive(engine: Engine, lead: TrainCoordinator) -> Any:
    """Four samples run while steps are taken, some of which are refused."""
    for seed in range(4):
        engine.submit(
            Request(
                request_id=str(seed), token_ids=(seed + 1, 3, 5), sampling=SamplingParams(seed=seed),
                stopping=StoppingCriteria(max_new_tokens=40, ignore_eos=True), response=ResponseOptions(logprobs=0),
            )
        )  # fmt: skip
    losses, tokens, versions = [], [], []
    for step in range(STEPS):
        answer = at_once(lead(step_call(step)))
        losses.append((answer.loss, answer.grad_norm, answer.logprobs))
        with pytest.raises(NotApplied, match=r"the loss is \S+: the loss of sequence 1 is not finite"):
            at_once(lead(step_call(step + 1, sequences=(FINE, BAD), loss="importance_sampling")))
        with pytest.raises(StepConflict):
            lead(step_call(step))
        for event in (event for _ in range(4) for event in engine.step()):
            tokens.append((event.request_id, event.token_ids, [entry.logprob for entry in event.logprobs]))
            versions.append(event.weight_version)
    while not engine.idle:
        engine.step()
    return losses, tokens, versions, at_once(lead(step_call(STEPS, kind=Kind.EVALUATE))).logprobs


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_steps_between_tokens_give_the_same_bits_on_two_ranks_as_on_one(
    ranks: Any, tmp_path: Path, family: str
) -> None:
    folder = str(save_tiny(family, tmp_path / family))
    one = serve_and_train(Group.single(), folder)
    assert ranks(2, serve_and_train, folder)[0] == one
    losses, tokens, versions, _ = one
    assert losses[-1][0] < losses[0][0] and tokens, "it learns, and streams run on"
    assert versions == sorted(versions) and set(versions) == set(range(1, STEPS + 1))


def three_ways(group: Group, folder: str) -> Any:
    """Rank 0, before any step and after each of six, with dropout: log-probabilities of the same eight tokens as
    Generate, Score and the training forward give them.
    """
    runner = build_runner(load(folder, group=group), CONFIG, 1 << 28)
    commands = Commands(group.comm, 30.0)
    side = TrainWorker(runner, Groups(group, Group.single()))
    if group.rank > 0:
        follow(runner, commands, side.handlers)
        return None
    engine = build_engine(runner, CONFIG, (), commands if group.size > 1 else None)
    lead, rows = TrainCoordinator(side, commands, engine.weights_changed), []
    for step in range(7):
        made = answered(engine, f"generate {step}", (7, 3, 5, 60), StoppingCriteria(max_new_tokens=8, ignore_eos=True))
        whole = (7, 3, 5, 60, *(entry.token_id for event in made for entry in event.logprobs))
        scored = answered(engine, f"score {step}", whole, StoppingCriteria(), score_only=True)
        asked = step_call(step, kind=Kind.EVALUATE, sequences=(TrainSequence(token_ids=whole),))
        evaluated = at_once(lead(asked))
        rows.append((
            [entry.logprob for event in made for entry in event.logprobs],
            [entry.logprob for event in scored for entry in event.prompt_logprobs or ()][3:],
            list(evaluated.logprobs[0][3:]),
        ))  # fmt: skip
        lead(step_call(step, dropout_seed=step))
    engine.close()
    return rows


def answered(engine: Engine, name: str, prompt: tuple[int, ...], stopping: StoppingCriteria, **more: Any) -> list[Any]:
    """All events of one request, run alone."""
    wanted = ResponseOptions(prompt_logprobs=0) if more else ResponseOptions(logprobs=0)
    engine.submit(
        Request(request_id=name, token_ids=prompt, sampling=SamplingParams(temperature=0.0), stopping=stopping,
                response=wanted, **more)
    )  # fmt: skip
    events = []
    while not engine.idle:
        events += engine.step()
    return events


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_generate_score_and_the_training_forward_agree_to_the_bit_after_every_step(
    ranks: Any, tmp_path: Path, family: str
) -> None:
    folder = str(save_tiny(family, tmp_path / family, **DROPOUTS[family]))
    one, two = three_ways(Group.single(), folder), ranks(2, three_ways, folder)[0]
    for generated, scored, trained in one:
        assert len(generated) == 8 and generated == scored == trained
    assert two == one
    assert len({tuple(generated) for generated, _, _ in one}) == 7, "every step changes them"


def test_a_refused_call_leaves_what_waits_as_it_was(tmp_path: Path) -> None:
    folder = str(save_tiny("gpt2", tmp_path / "gpt2"))
    clean, other = (
        TrainCoordinator(TrainWorker(runner_of(folder), SINGLE), Commands(None), lambda: None) for _ in range(2)
    )
    for lead in (clean, other):
        lead(step_call(0, kind=Kind.FORWARD_BACKWARD, idempotency_key="a"))
    with pytest.raises(RequestError, match="needs advantages"):
        other(step_call(0, kind=Kind.FORWARD_BACKWARD, loss="ppo"))
    with pytest.raises(NotApplied, match="everything is as it was before it.*the loss of sequence 1 is not finite"):
        at_once(other(step_call(0, sequences=(FINE, BAD), loss="importance_sampling")))
    with pytest.raises(NotApplied, match="the update would leave the weight"):
        other(step_call(0, kind=Kind.OPTIM_STEP, sequences=(), optimizer={"learning_rate": 1e39}))
    halves = [at_once(lead(step_call(0, kind=Kind.OPTIM_STEP, sequences=()))) for lead in (clean, other)]
    assert halves[0].grad_norm == halves[1].grad_norm
    with pytest.raises(StepConflict, match="no gradients are waiting"):
        other(step_call(1, kind=Kind.OPTIM_STEP, sequences=()))
    assert at_once(other(step_call(1))).logprobs == at_once(clean(step_call(1))).logprobs
