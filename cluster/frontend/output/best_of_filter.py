"""Holds the samples of one prompt back until all have ended, then lets the best ones through, as samples 0, 1, ...

Which are best is cluster.engine.beams.best_of's rule; what was cut off (abort, deadline) comes after what ended
by themselves.
"""

from __future__ import annotations

from cluster.engine.beams.best_of import best_places, mean_logprob
from cluster.engine.request import FinishReason
from cluster.frontend.output.streams import Chunk

ENDED = (FinishReason.STOP, FinishReason.LENGTH)


class BestOf:
    """`wanted` of `drawn` samples."""

    def __init__(self, wanted: int, drawn: int) -> None:
        self._wanted, self._drawn = wanted, drawn
        self._held: dict[int, Chunk] = {}
        self._num_ended = 0

    def take(self, chunk: Chunk) -> list[Chunk]:
        """Nothing until the last sample ends; then the best, whole."""
        held = self._held.setdefault(chunk.sample_index, chunk)
        if held is not chunk:
            held.extend(chunk)
        self._num_ended += chunk.finish_reason is not None
        return self._best() if self._num_ended == self._drawn else []

    def _best(self) -> list[Chunk]:
        samples = [self._held[index] for index in sorted(self._held)]
        for sample in samples:
            sample.score = mean_logprob([entry.logprob for entry in sample.logprobs], sample.stop_logprob)
        places = best_places([sample.score for sample in samples], len(samples))
        ranked = sorted((samples[place] for place in places), key=lambda sample: sample.finish_reason not in ENDED)
        chosen = ranked[: self._wanted]
        prompt = next((sample.prompt for sample in samples if sample.prompt is not None), None)
        scores = next((sample.prompt_logprobs for sample in samples if sample.prompt_logprobs is not None), None)
        for index, sample in enumerate(chosen):
            sample.sample_index, sample.prompt, sample.prompt_logprobs = index, None, None
        chosen[0].prompt, chosen[0].prompt_logprobs = prompt, scores
        return chosen
