"""Generation through the paged engine against transformers, and the same bits whatever rides along."""

from __future__ import annotations

import random
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cluster.engine.engine import Engine, Result, generate
from cluster.engine.engine_builder import build_engine, build_runner
from cluster.engine.engine_config import EngineConfig
from cluster.engine.request import Request, ResponseOptions, SamplingParams, Share, StoppingCriteria
from cluster.engine.run.command_stream import Commands
from cluster.engine.run.executors import follow
from cluster.engine.sequences.sequence import Sequence
from parallel.attention.forward_pass import Pass
from parallel.ranks.group import Group
from tests.cluster.engine.tiny_models import CONFIGS, VOCAB, WIDE, save_tiny, tiny_model
from tp_decoders import load
from tp_decoders.model.decoder import Decoder

FAMILIES = list(CONFIGS)
LENGTHS, NEW = (1, 3, 16, 17, 30, 45, 2, 33, 60, 15), (40, 30, 32, 25, 33, 20, 50, 9, 17, 1)
GREEDY = SamplingParams(temperature=0.0)


def prompts_of(lengths: Many[int], seed: int) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.randrange(1, VOCAB) for _ in range(length)) for length in lengths]


ASKED = list(zip(prompts_of(LENGTHS, seed=1), NEW, strict=True))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_tiny(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture(scope="module")
def expected() -> dict[str, list[list[int]]]:
    """What transformers generates, one prompt at a time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    answers = {family: [continued(tiny_model(family), *one) for one in ASKED] for family in FAMILIES}
    torch.set_num_threads(threads)
    return answers


def continued(model: transformers.PreTrainedModel, prompt: tuple[int, ...], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(  # an end-of-sequence that never comes
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=VOCAB,
        pad_token_id=0,
    )
    answer: list[int] = out[0, len(prompt) :].tolist()
    return answer


def engine_over(model: Decoder, **sizes: Any) -> Engine:
    config = EngineConfig(**{"kv_blocks": 64, "max_sequences": 16, "max_step_tokens": 64, **sizes})
    return build_engine(build_runner(model, config, 0), config)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"max_sequences": 3, "max_step_tokens": 7},  # prompts in many chunks, mixed with decoding
        {"kv_blocks": 9, "max_step_tokens": 24},  # preemption
    ],
    ids=["plain", "chunks", "preemption"],
)
def test_greedy_generation_equals_transformers_token_for_token(
    checkpoints: dict[str, Path], expected: dict[str, list[list[int]]], family: str, sizes: dict[str, int]
) -> None:
    engine = engine_over(load(str(checkpoints[family])), **sizes)
    requests = [
        Request(
            request_id=str(i),
            token_ids=prompt,
            sampling=GREEDY,
            stopping=StoppingCriteria(max_new_tokens=count, ignore_eos=True),
        )
        for i, (prompt, count) in enumerate(ASKED)
    ]
    results = generate(engine, requests)
    assert (engine.load().preemptions > 0) == ("kv_blocks" in sizes)
    answers = [result.token_ids for (result,) in results]
    assert answers == expected[family]
    assert len({token for answer in answers for token in answer}) > 15, "the model says too little to compare"


# ---------------------------------------------------------------------------------------------------- the same bits

PROBES = (
    Request(
        request_id="greedy",
        token_ids=prompts_of([33], seed=2)[0],
        sampling=GREEDY,
        stopping=StoppingCriteria(max_new_tokens=9, ignore_eos=True),
        response=ResponseOptions(logprobs=2, prompt_logprobs=0),
    ),
    Request(
        request_id="drawn",
        token_ids=prompts_of([18], seed=3)[0],
        sampling=SamplingParams(temperature=0.9, top_p=0.95, seed=4, n=2),
        stopping=StoppingCriteria(max_new_tokens=9, ignore_eos=True),
        response=ResponseOptions(logprobs=0, prompt_logprobs=1),
    ),
    Request(
        request_id="read from the cache",  # where it is there
        token_ids=prompts_of([33], seed=2)[0],
        sampling=GREEDY,
        stopping=StoppingCriteria(max_new_tokens=9, ignore_eos=True),
        response=ResponseOptions(logprobs=2),
    ),
    Request(request_id="scored", token_ids=prompts_of([50], seed=5)[0], score_only=True),
)
"""The requests whose every log-probability is compared."""

SCENES: dict[str, tuple[int, dict[str, int]]] = {
    "alone": (0, {}),
    "alone, chunks of 5": (0, {"max_sequences": 3, "max_step_tokens": 5, "max_scored_tokens": 3}),
    "prompts cached": (0, {}),
    "batch of 16": (13, {"max_step_tokens": 48}),
    "batch of 100, preempted": (
        97,
        {"max_sequences": 128, "max_step_tokens": 4096, "kv_blocks": 195, "prefix_caching": False},
    ),
    "beside three callers": (60, {"max_sequences": 32, "max_step_tokens": 96, "kv_blocks": 60}),
}
"""How many others ride along, and the engine's sizes."""

Answer = dict[str, list[Any]]


def company(count: int) -> list[Request]:
    """Requests that are there to be in the way."""
    rng = random.Random(6)
    lengths = [rng.randrange(1, 40) for _ in range(count)]
    return [
        Request(
            request_id=f"other{i}",
            token_ids=prompt,
            sampling=SamplingParams(temperature=rng.choice([0.0, 1.0]), seed=i),
            stopping=StoppingCriteria(max_new_tokens=rng.randrange(5, 30), ignore_eos=True),
        )
        for i, prompt in enumerate(prompts_of(lengths, seed=7))
    ]


def told(result: Result) -> list[Any]:
    """Everything a result says, for exact comparison."""
    return [result.token_ids, result.logprobs, result.prompt_logprobs, result.finish_reason]


def preempted_by(engine: Engine) -> set[str]:
    """A set that will hold the requests the engine preempts."""
    scheduler, names = engine.scheduler, set()
    set_aside = scheduler.planner.set_aside

    def noted(seq: Sequence) -> None:
        names.add(seq.request_id)
        set_aside(seq)

    scheduler.planner.set_aside = noted  # type: ignore[method-assign]
    return names


def serve_scene(model: Decoder, commands: Commands | None, scene: str) -> tuple[Answer, set[str]]:
    """Rank 0: the probes' answers in that scene, and which requests were preempted."""
    others, sizes = SCENES[scene]
    config = EngineConfig(**{"kv_blocks": 100, "max_sequences": 24, "max_step_tokens": 128, **sizes})  # type: ignore[arg-type]
    engine = build_engine(build_runner(model, config, 0), config, commands=commands)
    preempted, crowd = preempted_by(engine), company(others)
    if "callers" in scene:
        crowd = [replace(each, share=Share(f"caller {i % 3}")) for i, each in enumerate(crowd)]
    if "cached" in scene:
        generate(engine, [replace(PROBES[0], request_id="before", stopping=StoppingCriteria(max_new_tokens=1))])
        assert len(engine.scheduler.residents.pool.find(PROBES[0].token_ids, 2)[0]) == 2
    requests = [*crowd, *PROBES]  # the latest arrivals are preempted first
    results = dict(zip([request.request_id for request in requests], generate(engine, requests), strict=True))
    engine.close()
    return {probe.request_id: [told(sample) for sample in results[probe.request_id]] for probe in PROBES}, preempted


def follow_scene(model: Decoder, commands: Commands, sizes: dict[str, int]) -> None:
    config = EngineConfig(**{"kv_blocks": 100, "max_sequences": 24, "max_step_tokens": 128, **sizes})  # type: ignore[arg-type]
    follow(build_runner(model, config, 0), commands)


def serve_all_scenes(group: Group, folder: str, dtype: str) -> dict[str, tuple[Answer, set[str]]] | None:
    """Every scene on this group; the answers on rank 0."""
    model = load(folder, group=group, dtype=getattr(torch, dtype))
    answers = {}
    for name, (_, sizes) in SCENES.items():
        commands = None if group.size == 1 else Commands(group.talk)
        if group.rank == 0:
            answers[name] = serve_scene(model, commands, name)
        elif commands is not None:
            follow_scene(model, commands, sizes)
    return answers if group.rank == 0 else None


def trained_logprobs(model: Decoder, tokens: list[int]) -> list[float]:
    """Of every token after the first, through the forward that training uses."""
    ids = torch.tensor(tokens[:-1])
    with torch.enable_grad():
        logits = model(ids, Pass.packed([len(ids)]))
        assert logits.requires_grad
    values: list[float] = model.head.log_probs(logits.detach(), torch.tensor(tokens[1:])).tolist()
    return values


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_log_probability_has_the_same_bits_wherever_it_is_computed(
    checkpoints: dict[str, Path], ranks: Callable[..., list[Any]], family: str, dtype: str
) -> None:
    compare(str(checkpoints[family]), dtype, ranks, (1, 2, 3, 4, 8))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_long_uneven_sums_have_the_same_bits_too(tmp_path: Path, ranks: Callable[..., list[Any]], dtype: str) -> None:
    compare(str(save_tiny("gpt_neox", tmp_path, **WIDE)), dtype, ranks, (1, 2, 3))


def compare(folder: str, dtype: str, ranks: Callable[..., list[Any]], sizes: Many[int]) -> None:
    """All scenes at all sizes against one of them, and that one against the forward of training."""
    answers = {tp: ranks(tp, serve_all_scenes, folder, dtype, limit=120.0)[0] for tp in sizes}
    expected = answers[1]["alone"][0]
    for tp, scenes in answers.items():
        for scene, (answer, preempted) in scenes.items():
            assert answer == expected, f"tp = {tp}, {scene}"
            assert (len(preempted & {"greedy", "drawn"}) == 2) == ("preempted" in scene), (
                f"tp = {tp}, {scene}: {preempted}"
            )
    model = load(folder, dtype=getattr(torch, dtype))
    for probe in PROBES:
        for tokens, logprobs, _, _ in expected[probe.request_id]:
            prompt = expected[probe.request_id][0][2] or ()  # sent once, with the first sample
            served = [entry.logprob for entry in (*prompt, *logprobs)]
            trained = trained_logprobs(model, [*probe.token_ids, *tokens])
            assert served and served == trained[len(trained) - len(served) :]
