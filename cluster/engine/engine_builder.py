"""From a loaded model to an engine: attention backend, cache layout, number of blocks, runner.

Every rank calls the same functions in the same order (agreeing on the number of blocks is a collective). The caller
says how much memory this rank may count on; nothing here asks the machine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import replace

import torch

from cluster.engine.engine import Engine
from cluster.engine.engine_config import EngineConfig, num_kv_blocks
from cluster.engine.guided.guides import Guides, TokenTable
from cluster.engine.request import ModelLimits
from cluster.engine.run.canary import Canary
from cluster.engine.run.command_stream import Commands
from cluster.engine.run.executors import GroupExecutor, LocalExecutor
from cluster.engine.run.model_runner import ModelRunner
from parallel.attention.attend import Backend, choose_backend
from parallel.attention.kv_cache import KVLayout
from parallel.ranks.group import Group
from tp_decoders.model.decoder import Decoder

log = logging.getLogger(__name__)


def kv_layout(model: Decoder, config: EngineConfig) -> KVLayout:
    """What this rank stores per token."""
    weight = next(model.parameters())
    by_layer = tuple(model.heads(layer).n_local_kv for layer in range(model.config.n_layers))
    return KVLayout(
        n_layers=model.config.n_layers,
        n_kv_heads=by_layer[0],
        by_layer=by_layer,
        head_dim=model.config.head_dim,
        block_size=config.block_size,
        dtype=weight.dtype,
        device=weight.device,
    )


def attention_for(model: Decoder, requested: str | None) -> Backend:
    """The backend asked for, or the best one that works for this model here."""
    weight = next(model.parameters())
    return choose_backend(
        requested,
        weight.device,
        weight.dtype,
        alibi=model.config.positions == "alibi",
        head_dim=model.config.head_dim,
    )


def agreed_blocks(wanted: int, group: Group, device: torch.device | str) -> int:
    """The fewest blocks that any rank can hold. One collective, in groups of more than one."""
    if group.size == 1:
        return wanted
    most_negative = group.talk.all_reduce_max(torch.tensor([-wanted], dtype=torch.int64, device=device))
    return -int(most_negative)


def build_runner(model: Decoder, config: EngineConfig, free_bytes: int) -> ModelRunner:
    """This rank's runner, with a cache sized from `free_bytes` (this rank's share of what is free) or as configured."""
    layout = kv_layout(model, config)
    wanted = num_kv_blocks(config, layout.bytes_per_block, free_bytes, model.config.max_positions)
    num_blocks = agreed_blocks(wanted, model.group, layout.device)
    backend = attention_for(model, config.attention_backend)
    cache = backend.cache(layout, num_blocks)
    log.info(
        "key/value cache on rank %d: %d blocks of %d tokens = %d tokens, %.1f MiB; attention backend %s",
        model.group.rank, num_blocks, config.block_size, num_blocks * config.block_size,
        num_blocks * layout.bytes_per_block / 2**20, backend.name,
    )  # fmt: skip
    return ModelRunner(model, cache, backend, config.replay)


def limits_of(model: Decoder, eos_token_ids: Many[int] = ()) -> ModelLimits:
    """The model's own limits; an engine adds its cache's and its batch's.

    Files often name an end of text that a small or cut vocabulary does not have: GPT-2's own is transformers' default.
    """
    vocab_size = model.config.vocab_size
    beyond = [token_id for token_id in eos_token_ids if not 0 <= token_id < vocab_size]
    if beyond:
        log.warning(
            "the checkpoint's eos_token_id %s is not in its vocabulary of %d; it is ignored", beyond, vocab_size
        )
    return ModelLimits(
        vocab_size=vocab_size,
        max_context=model.config.max_positions,
        kv_capacity_tokens=0,
        eos_token_ids=tuple(token_id for token_id in eos_token_ids if token_id not in beyond),
        task=model.config.task,
        state_size=model.config.d_model,
    )


def build_engine(
    runner: ModelRunner,
    config: EngineConfig,
    eos_token_ids: Many[int] = (),
    commands: Commands | None = None,
    new_tokens: int | None = None,
    tables: Callable[[int, Many[int]], TokenTable | None] = lambda vocab_size, ends: None,
) -> Engine:
    """Rank 0's engine; `commands` reaches the other ranks, which run `executors.follow`. `tables` reads what the
    tokens of a vocabulary of that size stand for, some of which end a text, where a grammar asks for it.
    """
    executor = LocalExecutor(runner) if commands is None else GroupExecutor(runner, commands)
    limits = replace(limits_of(runner.model, eos_token_ids), new_tokens=new_tokens)
    guides = Guides(lambda: tables(limits.vocab_size, limits.eos_token_ids))
    return Engine(executor, limits, config, runner.cache.num_blocks, canary=Canary(runner, commands), guides=guides)
