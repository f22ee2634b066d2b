"""One rank's part of a step: mirror of block tables, model forward, and on rank 0 the choice of tokens.

Every rank runs the same plan in the same order, so the collectives inside the forward and after it match. Followers
return None: tokens, parameters of sampling and answers live on rank 0 only, and what it drew reaches the others with
the next plan.
"""

from __future__ import annotations

import time
from array import array

import torch
from torch import Tensor

from cluster.engine.request import TokenLogprobs
from cluster.engine.run.decode_programs import StepInputs, may_replay, programs_for
from cluster.engine.sample.beam_candidates import ranked_rows, whole_rows
from cluster.engine.sample.logprobs import Asked, at_temperatures, checked, token_logprobs
from cluster.engine.sample.pooling import Pooler
from cluster.engine.sample.sampler import Sampler, bad_rows
from cluster.engine.sample.token_masks import forbid
from cluster.engine.schedule.step_plan import StepPlan, StepResult
from parallel.attention.attend import Backend
from parallel.attention.forward_pass import Pass
from parallel.attention.kv_cache import KVCache
from parallel.attention.metadata import BlockTables, numbers
from parallel.vocabulary.top_tokens import Top, top_log_probs
from parallel.vocabulary.vocab_parallel import Best
from tp_decoders.model.decoder import Decoder


class ModelRunner:
    """A model, its cache, and the tables of the sequences in it."""

    def __init__(self, model: Decoder, cache: KVCache, backend: Backend, replay: bool = True) -> None:
        self.model, self.cache, self.backend = model, cache, backend
        self.sampler = Sampler(model.config.vocab_size)
        self.pooler = Pooler(model)
        self.weight_version = 0
        self.device = torch.device(cache.layout.device)
        self.programs = programs_for(model, cache, backend) if replay else None
        self._tables = BlockTables(cache.layout.block_size, self.device)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult | None:
        """The plan's result on rank 0, None elsewhere."""
        self._follow_tables(plan)
        inputs = self._inputs(plan)
        started = time.perf_counter()
        x_TD, logits_local, replayed = self._forward(plan, inputs)
        forwarded = time.perf_counter()
        result = self._choose(plan, logits_local)
        if result is not None and plan.pools:
            result.pools = self.pooler.answers(plan.pools, x_TD)
        if result is not None:
            result.weight_version, result.forward_seconds = self.weight_version, forwarded - started
            result.replayed = replayed
            result.sample_seconds = time.perf_counter() - forwarded
        return result

    def _follow_tables(self, plan: StepPlan) -> None:
        for slot, first, blocks in plan.tables:
            self._tables.write(slot, first, blocks)
        if plan.copies:
            self.cache.copy_blocks(plan.copies)

    def _inputs(self, plan: StepPlan) -> StepInputs:
        """The model's arguments: tokens, the pass, rows whose logits are wanted."""
        metadata = self._tables.step(plan.slots, plan.query_lens, plan.context_lens)
        tokens, rows = (numbers(array("q", given), self.device) for given in (plan.tokens, plan.rows))
        return StepInputs(tokens, Pass.cached(self.backend, self.cache, metadata), metadata, rows)

    def _forward(self, plan: StepPlan, inputs: StepInputs) -> tuple[Tensor, Tensor | None, bool]:
        """The last hidden states, the wanted rows of logits, and whether they were replayed."""
        if self.programs is not None and not plan.pools and may_replay(plan.query_lens, len(plan.rows)):
            found = self.programs.replay(inputs)
            outputs = self.programs.computed(inputs) if found is None else found
            return outputs.x_TD, outputs.logits, found is not None
        x_TD = self.model.hidden(inputs.tokens, inputs.now)
        return x_TD, self.model.logits(x_TD, inputs.rows) if plan.rows else None, False

    def _choose(self, plan: StepPlan, logits_local: Tensor | None) -> StepResult | None:
        """The collectives that each group of rows needs, on every rank; the rest on rank 0."""
        if logits_local is None:
            return StepResult(tokens=[]) if self.model.group.rank == 0 else None
        head, split = self.model.head, plan.num_argmax + plan.num_gathered
        forbid(logits_local, plan.masks, head.shards.range(head.group.rank)[0])
        best = head.argmax(logits_local[: plan.num_argmax]) if plan.num_argmax else None
        gathered = head.gather_to_first(logits_local[plan.num_argmax : split]) if plan.num_gathered else None
        top, scored = None, split + plan.num_ranked
        if plan.num_ranked:
            top = top_log_probs(logits_local[split:scored], plan.top_count, head.shards, head.group)
        scores = None
        if plan.targets:
            targets = torch.tensor(plan.targets, dtype=torch.long, device=self.device)
            scores = head.log_probs(at_temperatures(logits_local[scored:], plan.temperatures), targets)
        if self.model.group.rank != 0:
            return None
        result = self._result(plan, best, gathered, scores)
        if plan.beams:
            self._rank_beams(plan, gathered, top, result)
        return result

    def _rank_beams(self, plan: StepPlan, gathered: Tensor | None, top: Top | None, result: StepResult) -> None:
        """What follows each beam; the whole rows among them are the last of those gathered."""
        num_whole = len(plan.beams) - plan.num_ranked
        if num_whole and gathered is not None:
            logits_RV = gathered[plan.num_gathered - num_whole :]
            result.beams = whole_rows(plan.beams[:num_whole], logits_RV, self.model.head.full_log_normaliser(logits_RV))
        if top is not None:
            result.beams += ranked_rows(plan.beams[num_whole:], top.ids, top.log_probs)

    def _result(self, plan: StepPlan, best: Best | None, gathered: Tensor | None, scores: Tensor | None) -> StepResult:
        result = StepResult(tokens=[])
        if best is not None:
            result.tokens = best.ids.tolist()
            result.errors = bad_rows(best.logits.tolist())
        if gathered is not None:
            self._draw(plan, gathered, result)
        if scores is not None:
            values = iter(scores.tolist())
            result.plain_scores = [
                _whole([checked(token, next(values)) for token in score.targets]) for score in plan.plain_scores
            ]
        return result

    def _draw(self, plan: StepPlan, logits_RV: Tensor, result: StepResult) -> None:
        """Tokens for the gathered rows, and the log-probabilities that were asked for."""
        first, sequences = plan.num_argmax, plan.sampled[plan.num_argmax :]
        asked: list[Asked] = []
        if sequences:
            drawn = self.sampler.draw(logits_RV[: len(sequences)], sequences)
            result.tokens += drawn.tokens
            result.errors |= {first + place: reason for place, reason in drawn.errors.items()}
        for place, seq in enumerate(sequences):
            if seq.top_logprobs is not None and first + place not in result.errors:
                temperature = seq.answer.request.response.logprobs_temperature
                asked.append(Asked(place, result.tokens[first + place], seq.top_logprobs, temperature))
        num_chosen, row = len(asked), len(sequences)
        for score in plan.gathered_scores:
            asked += [Asked(row + i, token, score.top, score.temperature) for i, token in enumerate(score.targets)]
            row += len(score.targets)
        if not asked:
            return
        answers = token_logprobs(self.model.head, logits_RV, asked)
        result.logprobs = [None] * len(plan.sampled)
        for question, answer in zip(asked[:num_chosen], answers[:num_chosen], strict=True):
            _put(result, first + question.row, answer)
        rest = iter(answers[num_chosen:])
        result.gathered_scores = [_whole([next(rest) for _ in score.targets]) for score in plan.gathered_scores]


def _put(result: StepResult, place: int, answer: TokenLogprobs | str) -> None:
    if isinstance(answer, str):
        result.errors[place] = answer
    elif result.logprobs is not None:
        result.logprobs[place] = answer


def _whole(answers: list[TokenLogprobs | str]) -> list[TokenLogprobs] | str:
    """All of a run's values, or the first failure."""
    values = [answer for answer in answers if not isinstance(answer, str)]
    return values if len(values) == len(answers) else next(answer for answer in answers if isinstance(answer, str))
