"""Replayed steps give the bits of computed ones, and no program outlives what it was recorded from."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cluster.engine.engine import Engine
from cluster.engine.engine_builder import build_engine, build_runner
from cluster.engine.engine_config import EngineConfig
from cluster.engine.request import Request, ResponseOptions, SamplingParams, StoppingCriteria
from cluster.engine.run import decode_programs
from cluster.engine.run.decode_programs import DecodePrograms
from cluster.engine.run.model_runner import ModelRunner
from parallel.errors import ConfigError
from parallel.native.compiled import library
from parallel.options import Scheme
from parallel.sharding.parameter import written
from parallel.sharding.released_weight import assign, is_released, values
from tests.cluster.engine.tiny_models import CONFIGS, VOCAB, save_tiny
from tp_decoders import load
from tp_decoders.adapters import lora
from tp_decoders.model.decoder import Decoder
from tp_decoders.model.lora_config import LoraConfig

CONFIG = EngineConfig(kv_blocks=96, max_sequences=8, max_step_tokens=64)
_names = itertools.count()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_tiny(family, tmp_path_factory.mktemp(family)) for family in CONFIGS}


@pytest.fixture
def model(checkpoints: dict[str, Path]) -> Decoder:
    return load(checkpoints["gpt2"])


class Watched:
    """An engine that notes the logits of every step."""

    def __init__(self, model: Decoder, replay: bool) -> None:
        self.runner = build_runner(model, EngineConfig(**{**vars(CONFIG), "replay": replay}), 0)
        self.engine: Engine = build_engine(self.runner, CONFIG)
        self.logits: list[Tensor | None] = []
        self.tokens: list[tuple[str, tuple[int, ...]]] = []
        choose = self.runner._choose

        def noted(plan: Any, logits: Tensor | None) -> Any:
            self.logits.append(None if logits is None else logits.clone())
            return choose(plan, logits)

        self.runner._choose = noted  # type: ignore[method-assign, assignment]

    @property
    def programs(self) -> DecodePrograms:
        assert self.runner.programs is not None
        return self.runner.programs

    def ask(self, name: str, prompt: tuple[int, ...], count: int, temperature: float = 0.0) -> None:
        self.engine.submit(
            Request(
                request_id=name, token_ids=prompt, sampling=SamplingParams(temperature=temperature, seed=1),
                stopping=StoppingCriteria(max_new_tokens=count, ignore_eos=True),
                response=ResponseOptions(logprobs=2 if temperature else None),
            )
        )  # fmt: skip

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.tokens += [(event.request_id, event.token_ids) for event in self.engine.step()]


def both(model: Decoder) -> tuple[Watched, Watched]:
    return Watched(model, replay=True), Watched(model, replay=False)


def decoding(model: Decoder, sequences: int = 2) -> tuple[Watched, Watched]:
    """Two engines in the middle of the same decoding; the first one replays."""
    pair = both(model)
    for each in pair:
        for i in range(sequences):
            each.ask(f"r{i}", (1 + i, 2, 3), 100)
        each.steps(6)
    assert pair[0].programs.replayed >= 2
    return pair


def same(pair: tuple[Watched, Watched]) -> None:
    replayed, computed = pair
    assert replayed.tokens == computed.tokens
    assert len(replayed.logits) == len(computed.logits)
    for one, other in zip(replayed.logits, computed.logits, strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", CONFIGS)
def test_replayed_steps_have_the_bits_of_computed_ones(
    family: str, dtype: torch.dtype, checkpoints: dict[str, Path]
) -> None:
    """Up to eight sequences of growing length join and leave, greedy and drawn, over blocks that change hands."""
    pair = both(load(checkpoints[family], dtype=dtype))
    for each in pair:
        rng = random.Random(3)
        for turn in range(12):
            for i in range(rng.randrange(1, 4)):
                prompt = tuple(rng.randrange(1, VOCAB) for _ in range(rng.randrange(1, 20)))
                each.ask(f"r{turn}-{i}", prompt, rng.randrange(4, 40), rng.choice((0.0, 0.9)))
            each.steps(10)
        while not each.engine.idle:
            each.steps(1)
    same(pair)
    assert pair[0].programs.refusals == {}
    load_now = pair[0].engine.load()
    assert load_now.replayed_steps == pair[0].programs.replayed > 0.5 * load_now.steps
    assert pair[1].engine.load().replayed_steps == 0


@pytest.mark.parametrize("family", CONFIGS)
def test_a_model_whose_weights_are_stored_packed_only_is_replayed(family: str, checkpoints: dict[str, Path]) -> None:
    pair = decoding(load(checkpoints[family], dtype=torch.bfloat16, packed=True))
    same(pair)
    assert pair[0].programs.refusals == {}
    name, matrix = next((n, p) for n, p in pair[0].runner.model.named_parameters() if is_released(p))
    assign(matrix, values(matrix).flip(0))
    for each in pair:
        each.steps(6)
    same(pair)
    assert len(pair[0].programs) == 1, f"made anew after {name} was written to"


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_model_whose_weights_are_whole_numbers_is_replayed(scheme: Scheme, checkpoints: dict[str, Path]) -> None:
    pair = decoding(load(checkpoints["gpt_bigcode"], quantize=scheme))
    for each in pair:
        each.steps(20)
    same(pair)
    assert pair[0].programs.refusals == {} and pair[0].programs.replayed > 15


def test_adapters_are_replayed(checkpoints: dict[str, Path]) -> None:
    model = load(checkpoints["gpt_neox"], dtype=torch.bfloat16)
    lora.attach(model, LoraConfig(rank=4, alpha=8.0))
    randomise(model)
    pair = decoding(model)
    same(pair)
    assert pair[0].programs.refusals == {}


def randomise(model: Decoder) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".adapter.b"):
                parameter.normal_()


def weight_of(model: Decoder, layer: str) -> nn.Parameter:
    return model.get_parameter(f"{layer}.weight")


def one_element(model: Decoder) -> None:
    """Too little for the looks that a product takes at its weight."""
    with torch.no_grad():
        weight_of(model, "blocks.0.up")[5, 7] += 20.0


def through_data(model: Decoder) -> None:
    weight_of(model, "blocks.1.qkv").data[3] += 2.0


def by_a_kernel(model: Decoder) -> None:
    weight = weight_of(model, "blocks.0.down")
    weight.detach().numpy()[2, 2] += 20.0
    written(weight)


def replaced_memory(model: Decoder) -> None:
    model.norm.weight.data = model.norm.weight.detach() * 2


def another_parameter(model: Decoder) -> None:
    model.norm.bias = nn.Parameter(torch.ones_like(model.norm.bias))  # type: ignore[arg-type]


def an_adapter(model: Decoder) -> None:
    lora.attach(model, LoraConfig(rank=4, alpha=8.0))
    randomise(model)


def a_norm_in_place(model: Decoder) -> None:
    with torch.no_grad():
        model.norm.weight.mul_(3.0)


WRITES: list[Callable[[Decoder], None]] = [
    one_element, through_data, by_a_kernel, replaced_memory, another_parameter, an_adapter, a_norm_in_place,
]  # fmt: skip


@pytest.mark.parametrize("change", WRITES, ids=lambda change: change.__name__)
def test_no_program_outlives_the_weights_it_was_recorded_from(
    change: Callable[[Decoder], None], model: Decoder
) -> None:
    pair = decoding(model)
    change(model)
    for each in pair:
        each.steps(6)
    same(pair)


def test_adapters_come_go_merge_and_part_between_steps(model: Decoder) -> None:
    pair = decoding(model)
    lora.attach(model, LoraConfig(rank=4, alpha=8.0))
    randomise(model)
    for change in (lambda: None, lambda: lora.merge(model), lambda: lora.unmerge(model), lambda: lora.detach(model)):
        change()
        before = pair[0].programs.replayed
        for each in pair:
            each.steps(5)
        same(pair)
        assert pair[0].programs.replayed > before, "recorded anew"


def test_a_cache_in_other_memory_is_not_written_to_where_it_was(model: Decoder) -> None:
    pair = decoding(model)
    before = [each.runner.cache.keys[0] for each in pair]
    for each in pair:
        each.runner.cache.keys[0] = each.runner.cache.keys[0].clone()
        each.steps(4)
    same(pair)
    assert torch.equal(*(each.runner.cache.keys[0] for each in pair))
    assert not torch.equal(before[0], pair[0].runner.cache.keys[0]), "new keys stand in the new memory"


def test_threads_may_change_between_replays(model: Decoder) -> None:
    pair = decoding(model)
    before = library._loaded.config.threads
    try:
        for threads in (1, 3, 2):
            library.set_threads(threads)
            for each in pair:
                each.steps(3)
    finally:
        library.set_threads(before)
    same(pair)


def test_without_kernels_nothing_is_replayed(model: Decoder) -> None:
    replaying, _ = decoding(model)
    before = replaying.programs.replayed
    assert decode_programs.may_replay([1, 1], 2)
    library.withhold("a test")
    try:
        assert not decode_programs.may_replay([1, 1], 2)
    finally:
        library.withhold(None)
    assert replaying.programs.replayed == before


def test_a_weight_that_was_written_to_behind_all_counts_is_packed_again(model: Decoder) -> None:
    """Every replay looks at a few of its elements, as every product does, and the step is then computed."""
    pair = decoding(model)
    weight_of(model, "blocks.0.up").detach().numpy()[:] += 1.0
    pair[0].steps(1)
    assert len(pair[0].programs) == 0
    pair[1].steps(1)
    for each in pair:
        each.steps(4)
    same(pair)


def test_a_token_outside_of_the_vocabulary_raises_what_it_always_does(model: Decoder) -> None:
    pair = decoding(model, sequences=1)
    errors = []
    for each in pair:
        inputs = each.runner._inputs(plan_of(each))
        inputs.tokens[0] = VOCAB + 5
        with torch.inference_mode(), pytest.raises(IndexError) as error:
            each.runner._forward(plan_of(each), inputs)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def plan_of(watched: Watched) -> Any:
    plan = watched.engine.scheduler.schedule()
    assert plan is not None
    return plan


def test_programs_are_bounded_the_oldest_goes(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_programs, "MOST_PROGRAMS", 2)
    replaying, computed = both(model)
    for each in (replaying, computed):
        for i in range(6):
            each.ask(f"r{i}", (1 + i,), 6 + 5 * i)
        while not each.engine.idle:
            each.steps(1)
            assert each.runner.programs is None or len(each.runner.programs) <= 2
    same((replaying, computed))
    assert replaying.programs.nbytes > 0
    monkeypatch.setattr(decode_programs, "MOST_BYTES", 1)
    small = Watched(model, replay=True)
    small.ask("more", (1, 2), 8)
    small.steps(8)
    assert small.programs.nbytes == len(small.programs) == small.programs.replayed == 0


def test_what_cannot_be_recorded_is_computed(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here something else than a kernel runs between the blocks."""
    pair = both(model)
    block = model.blocks[0]
    block.register_forward_hook(lambda module, given, x: x.sin())
    for each in pair:
        each.ask("a", (1, 2, 3), 12)
        each.steps(12)
    same(pair)
    assert pair[0].programs.replayed == 0
    assert "sin" in pair[0].programs.refusals[1, 1]


def test_prompts_and_other_backends_are_computed(model: Decoder) -> None:
    assert not decode_programs.may_replay([1, 30], 2)
    assert not decode_programs.may_replay([], 0)
    assert not decode_programs.may_replay([1] * 200, 200)
    assert build_runner(model, EngineConfig(kv_blocks=4, replay=False), 0).programs is None
    assert build_runner(model, EngineConfig(kv_blocks=4, attention_backend="eager"), 0).programs is None


def test_a_step_follows_only_one_of_its_size(model: Decoder) -> None:
    runner: ModelRunner = build_runner(model, CONFIG, 0)
    runner._tables.write(0, 0, [1])
    runner._tables.write(1, 0, [2])
    one, two = (runner._tables.step(range(n), [1] * n, [3] * n).paged_step for n in (1, 2))
    with pytest.raises(ConfigError, match="cannot stand where one of"):
        one.follow(two)
