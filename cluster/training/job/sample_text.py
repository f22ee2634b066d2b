"""Continuations of a few prompts by the model that is being trained, as it is at this moment: no copy of the weights.

The engine's own pieces run over the live model with a cache of just the size needed, which is given back afterwards.
All ranks of one tensor-parallel group call it together; the first one gets the answers. Changes nothing of the
training: neither weights nor any random state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.engine.engine import generate
from cluster.engine.engine_builder import build_engine, build_runner
from cluster.engine.engine_config import EngineConfig
from cluster.engine.request import Request, SamplingParams, StoppingCriteria
from cluster.engine.run.command_stream import Commands
from cluster.engine.run.executors import follow
from parallel.errors import ConfigError
from tp_decoders.model.decoder import Decoder
from tp_decoders.text.tokenizer import Tokenizer

BLOCK = 16


@dataclass(frozen=True)
class Continuation:
    """What the model made of a prompt."""

    prompt: str
    text: str
    num_tokens: int
    ended: str  # "stop" or "length"

    def record(self) -> dict[str, str | int]:
        return {"prompt": self.prompt, "text": self.text, "tokens": self.num_tokens, "ended": self.ended}


class Prompts:
    """Texts to continue, by up to max_tokens tokens each, checked against a model's context."""

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer, context: int, max_tokens: int) -> None:
        self.texts, self.tokenizer, self.max_tokens = tuple(texts), tokenizer, max_tokens
        self.ids = [tuple(tokenizer.encode(text)) for text in texts]
        for text, ids in zip(self.texts, self.ids, strict=True):
            if not ids:
                raise ConfigError(f"samples.prompts: {text!r} has no tokens; give at least one")
            if len(ids) + max_tokens > context:
                raise ConfigError(
                    f"samples.prompts: {text[:40]!r} has {len(ids)} tokens; with samples.max_tokens {max_tokens} that "
                    f"is more than the model's context of {context}: shorten either"
                )

    def engine_config(self, attention_backend: str | None) -> EngineConfig:
        """An engine with room for these and no more."""
        blocks = sum(-(-(len(ids) + self.max_tokens) // BLOCK) + 1 for ids in self.ids)
        return EngineConfig(
            block_size=BLOCK, kv_blocks=blocks, max_sequences=len(self.ids), max_step_tokens=max(512, len(self.ids)),
            prefix_caching=False, attention_backend=attention_backend,
        )  # fmt: skip

    def requests(self, sampling: SamplingParams) -> list[Request]:
        stopping = StoppingCriteria(max_new_tokens=self.max_tokens)
        return [
            Request(request_id=f"sample-{index}", token_ids=ids, sampling=sampling, stopping=stopping)
            for index, ids in enumerate(self.ids)
        ]


def sample_live(
    model: Decoder,
    prompts: Prompts,
    sampling: SamplingParams,
    *,
    attention_backend: str | None = None,
    timeout_s: float = 60.0,
) -> list[Continuation] | None:
    """One continuation of each prompt; None on all ranks but the group's first."""
    config, group = prompts.engine_config(attention_backend), model.group
    was_training = model.training
    model.eval()
    runner = build_runner(model, config, free_bytes=0)
    commands = Commands(group.comm, timeout_s)
    if group.rank != 0:
        follow(runner, commands)
        model.train(was_training)
        return None
    engine = build_engine(runner, config, prompts.tokenizer.eos_token_ids, commands if group.size > 1 else None)
    results = [samples[0] for samples in generate(engine, prompts.requests(sampling))]
    engine.close()
    model.train(was_training)
    return [
        Continuation(
            text, prompts.tokenizer.decode(result.token_ids), len(result.token_ids),
            result.finish_reason.value if result.finish_reason else "unfinished",
        )
        for text, result in zip(prompts.texts, results, strict=True)
    ]  # fmt: skip
