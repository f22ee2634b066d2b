"""Random beam searches, and what transformers makes of them: `generate`, and for groups its scorer in its old loop."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.functional import log_softmax
from transformers import LogitsProcessorList
from transformers.generation import logits_process
from transformers.generation.beam_search import BeamSearchScorer

from cluster.engine.engine import Engine
from cluster.engine.engine_builder import build_engine, build_runner
from cluster.engine.engine_config import EngineConfig
from cluster.engine.request import BeamParams, Request, ResponseOptions, SamplingParams, StoppingCriteria
from tests.cluster.engine.tiny_models import CONFIGS, VOCAB
from tp_decoders import load

Answers = list[tuple[list[int], float]]
"""Tokens, with the stop token that ended them, and score of each sequence, best first."""


@dataclass(frozen=True)
class Case:
    """One prompt, one search."""

    family: str
    request: Request

    @property
    def beam(self) -> BeamParams:
        assert self.request.sampling.beam is not None
        return self.request.sampling.beam


def drawn_case(number: int) -> Case:
    """The case of that number: the same on every call."""
    rng = random.Random(f"beams {number}")
    groups = rng.choice((1, 1, 1, 2, 3))
    width = groups * rng.choice((1, 2, 3) if groups > 1 else (2, 3, 4, 8))
    most = rng.choice((1, 6, 17, 24))
    beam = BeamParams(
        width=width,
        length_penalty=rng.choice((1.0, 1.0, 0.0, 2.0, -1.0, 0.6)),
        early_stopping=rng.choice((True, False, "never")),
        groups=groups,
        diversity_penalty=rng.choice((0.3, 2.0)) if groups > 1 else 0.0,
    )
    chosen = [tuple(rng.randrange(1, VOCAB) for _ in range(length)) for length in (1, 1, 2)]
    sampling = SamplingParams(
        n=rng.randint(1, width),
        repetition_penalty=rng.choice((1.0, 1.0, 1.0, 1.4, 0.8)),
        no_repeat_ngram_size=rng.choice((0, 0, 0, 1, 2, 3)),
        bad_words=tuple(chosen) if rng.random() < 0.25 else (),
        logit_bias={rng.randrange(1, VOCAB): 1.5, rng.randrange(1, VOCAB): -2.0} if rng.random() < 0.15 else {},
        beam=beam,
    )
    stops = rng.sample(range(1, VOCAB), rng.choice((0, 1, 5, 12, 30)))
    stopping = StoppingCriteria(
        max_new_tokens=most,
        min_new_tokens=rng.choice((0, 0, min(3, most))),
        stop_token_ids=tuple(stops),
        ignore_eos=True,
        include_stop_sequence=True,
    )
    words = tuple(word for word in sampling.bad_words if word[0] not in stops or len(word) > 1)
    sampling = replace(sampling, bad_words=words)  # one that is a stop token is no bad word to transformers
    prompt = tuple(rng.randrange(1, VOCAB) for _ in range(rng.choice((1, 5, 15, 16, 17, 33))))
    request = Request(request_id=f"{number}", token_ids=prompt, sampling=sampling, stopping=stopping)
    return Case(list(CONFIGS)[number % len(CONFIGS)], request)


def expected(model: transformers.PreTrainedModel, case: Case) -> Answers:
    """transformers' sequences and scores."""
    with torch.no_grad():
        sequences, scores = (_generated if case.beam.groups == 1 else _grouped)(model, case)
    stops, start = set(_stops(case)), len(case.request.token_ids)
    rows = [row[start:] for row in sequences.tolist()]
    ends = [next((i + 1 for i, token in enumerate(row) if token in stops), len(row)) for row in rows]
    return [(row[:end], score) for row, end, score in zip(rows, ends, scores.tolist(), strict=True)]


def comparable(case: Case, tokens: list[int]) -> list[int]:
    """With groups transformers' scorer writes the first of the stop tokens whichever it was that ended a sequence."""
    stops = case.request.stopping.stop_token_ids
    return [*tokens[:-1], stops[0]] if case.beam.groups > 1 and tokens[-1] in stops else tokens


def _stops(case: Case) -> list[int]:
    return list(case.request.stopping.stop_token_ids) or [VOCAB]  # a token that never comes


def _generated(model: transformers.PreTrainedModel, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    request, given = case.request, case.request.sampling
    ids = torch.tensor([request.token_ids])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        num_beams=case.beam.width,
        num_return_sequences=given.n,
        length_penalty=case.beam.length_penalty,
        early_stopping=case.beam.early_stopping,
        max_new_tokens=request.stopping.max_new_tokens,
        min_new_tokens=request.stopping.min_new_tokens or None,
        repetition_penalty=given.repetition_penalty,
        no_repeat_ngram_size=given.no_repeat_ngram_size,
        bad_words_ids=[list(word) for word in given.bad_words] or None,
        sequence_bias={(token,): bias for token, bias in given.logit_bias.items()} or None,
        eos_token_id=_stops(case),
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    return out.sequences, out.sequences_scores


def _processors(case: Case) -> LogitsProcessorList:
    """In the order in which `generate` puts them."""
    given, stopping, beam = case.request.sampling, case.request.stopping, case.beam
    made = LogitsProcessorList()
    if given.logit_bias:
        made.append(logits_process.SequenceBiasLogitsProcessor({(t,): b for t, b in given.logit_bias.items()}))
    made.append(logits_process.HammingDiversityLogitsProcessor(beam.diversity_penalty, beam.width, beam.groups))
    if given.repetition_penalty != 1.0:
        made.append(logits_process.RepetitionPenaltyLogitsProcessor(given.repetition_penalty))
    if given.no_repeat_ngram_size:
        made.append(logits_process.NoRepeatNGramLogitsProcessor(given.no_repeat_ngram_size))
    stops = torch.tensor(_stops(case))
    if given.bad_words:
        made.append(logits_process.NoBadWordsLogitsProcessor([list(word) for word in given.bad_words], stops))
    if stopping.min_new_tokens and stopping.stop_token_ids:
        start = len(case.request.token_ids)
        made.append(logits_process.MinNewTokensLengthLogitsProcessor(start, stopping.min_new_tokens, stops))
    return made


def _grouped(model: transformers.PreTrainedModel, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Group beam search, which `generate` itself no longer has, over transformers' scorer and processors."""
    beam, stops, start = case.beam, torch.tensor(_stops(case)), len(case.request.token_ids)
    size, longest = beam.width // beam.groups, start + (case.request.stopping.max_new_tokens or 0)
    scorer = BeamSearchScorer(
        1, beam.width, torch.device("cpu"), beam.length_penalty, beam.early_stopping,
        case.request.sampling.n, beam.groups, longest,
    )  # fmt: skip
    processors, ends = _processors(case), {"pad_token_id": int(stops[0]) % VOCAB, "eos_token_id": stops}
    ids = torch.tensor([case.request.token_ids] * beam.width)
    totals = torch.full((beam.width,), -1e9)
    totals[::size] = 0.0
    while not scorer.is_done and ids.shape[1] < longest:
        rows = log_softmax(model(ids).logits[:, -1].float(), -1)
        taken = torch.zeros(beam.width, dtype=torch.long)
        parents = torch.zeros(beam.width, dtype=torch.long)
        for group in range(beam.groups):
            mine = slice(group * size, (group + 1) * size)
            scores = processors(ids[mine], rows[mine], current_tokens=taken, beam_group_idx=group)
            found = (scores + totals[mine, None]).flatten().topk(max(2, 1 + len(stops)) * size)
            step = scorer.process(
                ids[mine], found.values[None], found.indices[None] % VOCAB, found.indices[None] // VOCAB,
                group_index=group, decoder_prompt_len=start, **ends,
            )  # fmt: skip
            totals[mine], taken[mine] = step["next_beam_scores"], step["next_beam_tokens"]
            parents[mine] = step["next_beam_indices"] + group * size
        ids = torch.cat([ids[parents], taken[:, None]], 1)
    done = scorer.finalize(ids, totals, taken, parents, max_length=longest, decoder_prompt_len=start, **ends)
    return done["sequences"], done["sequence_scores"]


# ---------------------------------------------------------------------------------------------- long searches

RNG = random.Random(8)
PROMPTS = [tuple(RNG.randrange(1, VOCAB) for _ in range(length)) for length in (20, 33, 16, 40)]
SEARCHES = tuple(
    Request(
        request_id=f"search {i}",
        token_ids=PROMPTS[i],
        sampling=sampling,
        stopping=StoppingCriteria(max_new_tokens=40, stop_token_ids=(5, 6), min_new_tokens=30, ignore_eos=True),
        response=ResponseOptions(logprobs=3, prompt_logprobs=1),
    )
    for i, sampling in enumerate(
        (
            SamplingParams(n=4, beam=BeamParams(width=4)),
            SamplingParams(n=3, repetition_penalty=1.2, beam=BeamParams(width=4, length_penalty=0.0)),
            SamplingParams(n=4, beam=BeamParams(width=4, groups=2, diversity_penalty=0.5)),
            SamplingParams(n=2, no_repeat_ngram_size=2, beam=BeamParams(width=3, groups=3, diversity_penalty=1.0)),
        )
    )
)
COMPANY = tuple(
    Request(
        request_id=f"drawn {i}",
        token_ids=PROMPTS[i][: 5 + i],
        sampling=SamplingParams(seed=i, n=2),
        stopping=StoppingCriteria(max_new_tokens=25 + i, ignore_eos=True),
    )
    for i in range(4)
)


def engine_over(folder: Path | str, **sizes: Any) -> Engine:
    config = EngineConfig(**{"kv_blocks": 128, "max_sequences": 24, "max_step_tokens": 96, **sizes})
    return build_engine(build_runner(load(str(folder)), config, 0), config)


def check_all_free(engine: Engine) -> None:
    residents = engine.scheduler.residents
    residents.check()
    assert residents.pool.num_free == residents.pool.num_blocks and not residents.running
    assert len(residents._slots) == engine.config.max_sequences + engine.config.guest_slots
    assert not engine.scheduler.beams
