"""Requests of every kind that is drawn, drafters that are right, wrong or absurd, and what an engine told of each."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many

from cluster.engine.engine import Engine, Result, generate
from cluster.engine.engine_builder import build_engine, build_runner
from cluster.engine.engine_config import EngineConfig, SpeculationConfig
from cluster.engine.request import EngineLoad, Request, ResponseOptions, SamplingParams, Share, StoppingCriteria
from cluster.engine.run.command_stream import Commands
from cluster.engine.run.executors import follow
from cluster.engine.sequences.sequence import Sequence
from cluster.engine.speculate.drafter import Drafter
from parallel.ranks.group import Group
from tests.cluster.engine.tiny_models import VOCAB
from tp_decoders import load
from tp_decoders.model.decoder import Decoder

Answers = dict[str, list[Result]]

SCENES: dict[str, dict[str, object]] = {
    "plain": {},
    "chunks": {"max_sequences": 3, "max_step_tokens": 7, "max_scored_tokens": 3},
    "preempted": {"kv_blocks": 9, "max_step_tokens": 24},
    "large blocks": {"block_size": 32, "kv_blocks": 32},
    "nothing cached": {"prefix_caching": False},
}


def drawn_request(number: int) -> Request:
    """The request of that number: the same on every call."""
    rng = random.Random(f"speculation {number}")
    most = rng.choice((1, 2, 9, 17, 30))
    few = tuple(rng.sample(range(1, VOCAB), rng.choice((2, 3, 5))))
    run = [rng.randrange(1, VOCAB) for _ in range(rng.choice((1, 2, 3, 5)))]
    length = rng.choice((1, 2, 15, 16, 17, 33))
    prompt = (run * length)[:length] if rng.random() < 0.5 else [rng.randrange(1, VOCAB) for _ in range(length)]
    return Request(
        request_id=f"r{number}",
        token_ids=tuple(prompt),
        sampling=SamplingParams(
            temperature=rng.choice((0.0, 0.0, 0.3, 1.0)),
            top_k=rng.choice((None, None, 3)),
            top_p=rng.choice((None, None, 0.7)),
            seed=rng.randrange(99),
            n=rng.choice((1, 1, 1, 2, 3)),
            repetition_penalty=rng.choice((1.0, 1.0, 1.0, 1.3, 0.7)),
            presence_penalty=rng.choice((0.0, 0.0, 0.0, 0.5)),
            frequency_penalty=rng.choice((0.0, 0.0, 0.0, 0.4, -0.4)),
            logit_bias={few[0]: 2.5} if rng.random() < 0.1 else {},
            allowed_token_ids=few if rng.random() < 0.25 else None,
            bad_words=(few[:2],) if rng.random() < 0.15 else (),
            no_repeat_ngram_size=rng.choice((0, 0, 0, 0, 3)),
            no_speculation=rng.random() < 0.1,
        ),
        stopping=StoppingCriteria(
            max_new_tokens=most,
            min_new_tokens=rng.choice((0, 0, 0, most // 2, most)),
            ignore_eos=rng.random() < 0.5,
            stop_token_ids=tuple(rng.sample(range(1, VOCAB), rng.choice((0, 0, 1, 4)))),
            include_stop_sequence=rng.random() < 0.5,
        ),
        response=ResponseOptions(
            logprobs=rng.choice((None, None, 0, 2)),
            prompt_logprobs=rng.choice((None, None, None, 0, 1)),
            logprobs_temperature=rng.choice((1.0, 1.0, 0.6)),
        ),
        share=rng.choice((Share("a"), Share("a"), Share("b", weight=2.0))),
    )


class Knowing:
    """Proposes what plain decoding answered, each token wrong with a probability; lengths are drawn."""

    def __init__(self, answers: Mapping[str, Many[Result]], wrong: float) -> None:
        self._answers, self._wrong, self._rng = answers, wrong, random.Random(1)

    def propose(self, seq: Sequence, most: int) -> list[int]:
        done = len(seq.tokens) - seq.prompt_len
        right = self._answers[seq.request_id][seq.index].token_ids[done : done + self._rng.randint(0, most)]
        return [self._rng.randrange(VOCAB) if self._rng.random() < self._wrong else token for token in right]

    def ended(self, seq: Sequence) -> None:
        pass


class Absurd:
    """Proposes too much, and what is no token; sometimes it raises."""

    def __init__(self) -> None:
        self._rng = random.Random(2)

    def propose(self, seq: Sequence, most: int) -> list[int]:
        if self._rng.random() < 0.2:
            raise RuntimeError("no idea")
        return [
            self._rng.choice((1, seq.tokens[-1], -1, VOCAB, 1 << 70)) for _ in range(most + self._rng.randint(0, 9))
        ]

    def ended(self, seq: Sequence) -> None:
        raise RuntimeError("not even then")


def ask(engine: Engine, requests: Many[Request]) -> Answers:
    results = generate(engine, requests)
    return dict(zip([request.request_id for request in requests], results, strict=True))


def config_of(scene: str, speculation: SpeculationConfig) -> EngineConfig:
    sizes = {"kv_blocks": 64, "max_sequences": 12, "max_step_tokens": 64, **SCENES[scene]}
    return EngineConfig(speculation=speculation, **sizes)  # type: ignore[arg-type]


OFF = SpeculationConfig()
EAGER = SpeculationConfig(method="ngram", prompt_lookup_min=1, max_rows=64)
"""Drafts in every step, however full."""
Make = Callable[[Answers], Drafter | None]
DRAFTERS: dict[str, Make] = {
    "ngram": lambda _: None,
    "always right": lambda answers: Knowing(answers, 0.0),
    "mostly right": lambda answers: Knowing(answers, 0.15),
    "always wrong": lambda answers: Knowing(answers, 1.0),
    "absurd": lambda _: Absurd(),
}


def compare(
    model: Decoder, commands: Commands | None, scene: str, requests: Many[Request], drafters: Many[str]
) -> dict[str, EngineLoad]:
    """Rank 0: the requests without speculation, then with each drafter; fails where an answer differs."""
    loads = {}
    plain = engine_over(model, commands, scene, OFF)
    expected = ask(plain, requests)
    plain.close()
    for name in drafters:
        engine = engine_over(model, commands, scene, EAGER)
        engine.scheduler.speculator.drafter = DRAFTERS[name](expected) or engine.scheduler.speculator.drafter
        given = ask(engine, requests)
        engine.close()
        for request in requests:
            assert given[request.request_id] == expected[request.request_id], f"{name}, {scene}: {request}"
        engine.scheduler.residents.check()
        loads[name] = engine.load()
        assert loads[name].kv_blocks_free == loads[name].kv_blocks_total, "blocks were lost"
        assert not engine.scheduler.speculator._lengths, "an ended sequence is still known"
    loads["off"] = plain.load()
    return loads


def engine_over(model: Decoder, commands: Commands | None, scene: str, speculation: SpeculationConfig) -> Engine:
    config = config_of(scene, speculation)
    return build_engine(build_runner(model, config, 0), config, eos_token_ids=(0,), commands=commands)


def compare_on(group: Group, folder: str, scene: str, count: int) -> dict[str, EngineLoad] | None:
    """The same on a group; an engine's followers go on with the next one's commands."""
    model, drafters = load(folder, group=group), ("ngram", "mostly right")
    requests = [drawn_request(number) for number in range(count)]
    commands = Commands(group.talk)
    if group.rank == 0:
        return compare(model, commands, scene, requests, drafters)
    for _ in range(1 + len(drafters)):
        follow(build_runner(model, config_of(scene, OFF), 0), commands)
    return None
