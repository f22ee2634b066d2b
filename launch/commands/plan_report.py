"""What `plan` does once its arguments are read: finds the layouts that fit, prints them with their memory, and writes
the best one's preset.

No arithmetic here: cluster.training.memory has it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml

from cluster.training.memory.estimate import (
    Layout,
    RankMemory,
    Setup,
    joined,
    lasting,
    passing,
    serving_memory,
    shard,
)
from cluster.training.memory.layouts import Candidate, Plan, Question, make_plan, nearest
from cluster.training.step.flops import num_parameters
from launch.paths import full_path
from launch.presets import find, read
from parallel.errors import ConfigError
from tp_decoders.hub.repository import is_name, locate
from tp_decoders.hub.snapshot_cache import CONFIG
from tp_decoders.model.config import DecoderConfig
from tp_decoders.model.lora_config import LoraConfig
from tp_decoders.registry import config_from_hf, family_of, read_config

GiB = 2**30
YAML = (".yaml", ".yml")
KINDS = tuple(field.name for field in fields(RankMemory))


def model_config(name: str) -> DecoderConfig:
    """A preset of configs/models, a YAML file of that kind, or a checkpoint's folder or name on the hub."""
    if Path(name).is_dir() or is_hub(name):
        return read_config(locate(name, CONFIG))
    return config_from_hf(dict(read(find(name, "models")).values), unread="refuse")


def is_hub(name: str) -> bool:
    return not Path(name).exists() and is_name(name) and not name.endswith(YAML)


def question_of(args: argparse.Namespace, memory: int) -> Question:
    """The command line's question."""
    if args.out is not None and args.out.exists():
        raise ConfigError(f"--out {args.out} exists; name a new file")
    for flag in ("gpus", "per_node", "sequence", "batch_size", "micro_batch_tokens", "streams", "lora_rank", "show"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} is {value}; give at least 1")
    config = model_config(args.model)
    sequence = args.sequence or config.max_positions
    serve = args.mode == "serve"
    tokens = args.micro_batch_tokens or (min(1024, sequence) if serve else sequence)
    if not serve and tokens < sequence:
        raise ConfigError(
            f"--micro-batch-tokens is {tokens} and a sample has {sequence} tokens: sequences are never cut; give at "
            "least as many, or a shorter --sequence"
        )
    targets = args.lora_targets if "," not in args.lora_targets else tuple(args.lora_targets.split(","))
    lora = LoraConfig(rank=args.lora_rank, alpha=2.0 * args.lora_rank, targets=targets) if args.mode == "lora" else None
    dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    setup = Setup(tokens=tokens, dtype=getattr(torch, dtype), device=args.device, lora=lora)
    return Question(
        config=config, ranks=args.gpus, memory=memory, per_node=args.per_node, setup=setup, sequence=sequence,
        batch_size=args.batch_size or max(64, args.gpus), serve=serve, streams=args.streams,
    )  # fmt: skip


def answer(question: Question, args: argparse.Namespace) -> int:
    """Prints the plan; 0 where something fits, 1 where nothing does."""
    plan = make_plan(question)
    print(headline(question, args.model, args.mode))
    if not plan.fitting:
        print("\n".join(refusal(plan)))
        return 1
    print("\n".join(listed(plan, args.show)))
    best = plan.fitting[0]
    print("\n".join(["", f"{best.layout.name}: GiB of each rank at its worst moment", *by_rank(question, best.layout)]))
    text = preset(question, best, args.model, args.mode)
    if args.out is None:
        print(f"\n{text}", end="")
    else:
        _write_new(args.out, text)
        print(f"\npreset: {args.out}")
    return 0


def headline(question: Question, model: str, mode: str) -> str:
    config, setup = question.config, question.setup
    billions = num_parameters(shard(config, 1, Setup(tokens=1, dtype=setup.dtype, device="cuda"), 0)) / 1e9
    doing = {"full": "full fine-tuning", "lora": "LoRA fine-tuning", "serve": "serving"}[mode]
    if setup.lora is not None:
        doing += f" (rank {setup.lora.rank}, {_words(setup.lora.targets or family_of(config.model_type).lora_targets)})"
    load = (
        f"{question.streams} sequences of {question.sequence} tokens at once, steps of {setup.tokens}"
        if question.serve
        else f"{question.batch_size} samples of {question.sequence} tokens a step, micro-batches of {setup.tokens}"
    )
    return (
        f"{model}: {config.model_type}, {billions:.2f} B parameters; {doing} in {dtype_name(setup)}\n"
        f"on {question.ranks} {setup.device} ranks of {question.memory / GiB:.1f} GiB, {question.per_node} to a node; "
        f"{load}\n"
    )


def listed(plan: Plan, most: int) -> Iterator[str]:
    """The layouts that fit, best first, and how near the others are."""
    width = max(len(candidate.layout.name) for candidate in plan.fitting[:most])
    yield f"     {'layout':{width}}    GiB  why"
    for number, candidate in enumerate(plan.fitting[:most], 1):
        needs = candidate.memory.total / GiB
        yield f"{number:3}  {candidate.layout.name:{width}}  {needs:5.1f}  {'; '.join(candidate.reasons)}"
    if len(plan.fitting) > most:
        yield f"     and {len(plan.fitting) - most} more that fit"
    if plan.others:
        least = plan.others[0]
        yield (
            f"     {len(plan.others)} do not fit; the smallest of them, {least.layout.name}, needs "
            f"{least.memory.total / GiB:.1f} GiB"
        )


def refusal(plan: Plan) -> Iterator[str]:
    """Why not, and what would."""
    question, least = plan.question, plan.others[0]
    yield (
        f"no layout fits: the smallest, {least.layout.name}, needs {least.memory.total / GiB:.1f} GiB on each rank, "
        f"{(least.memory.total - question.memory) / GiB:.1f} GiB more than there are"
    )
    yield from by_rank(question, least.layout)
    more = nearest(question)
    if more is None:
        yield "no number of such ranks would do; take fewer tokens in a micro-batch, a shorter sequence or larger ranks"
        return
    ranks, candidate = more[0].ranks, more[1]
    yield (
        f"nearest that would fit: {ranks} such ranks, {candidate.layout.name}, {candidate.memory.total / GiB:.1f} GiB; "
        f"or {question.ranks} ranks with {least.memory.total / GiB:.1f} GiB each"
    )


def by_rank(question: Question, layout: Layout) -> Iterator[str]:
    """A table of kinds; ranks that are alike share a line."""
    rows = list(rank_memory(question, layout))
    kinds = [kind for kind in KINDS if any(getattr(row, kind) for row in rows)]
    yield "tp rank  " + "  ".join(f"{kind:>11}" for kind in (*kinds, "total"))
    start = 0
    for rank in range(1, layout.tp + 1):
        if rank == layout.tp or rows[rank] != rows[start]:
            name = f"{start}" if rank == start + 1 else f"{start}-{rank - 1}"
            values = [*(getattr(rows[start], kind) for kind in kinds), rows[start].total]
            yield f"{name:>7}  " + "  ".join(f"{value / GiB:11.2f}" for value in values)
            start = rank


def rank_memory(question: Question, layout: Layout) -> Iterator[RankMemory]:
    """Of every tensor-parallel rank; those that hold as much also compute alike."""
    config, setup, passes = question.config, question.setup, {}
    for rank in range(layout.tp):
        if question.serve:
            yield serving_memory(config, layout.tp, setup, question.streams * question.sequence, rank)
            continue
        static = lasting(config, layout.tp, layout.dp, setup, rank)
        if static not in passes:
            passes[static] = passing(config, layout, setup, rank)
        yield joined(static, passes[static], setup)


def preset(question: Question, best: Candidate, model: str, mode: str) -> str:
    """YAML for `train --config`, or for `serve --cluster`."""
    needs = f"{best.memory.total / GiB:.1f} of {question.memory / GiB:.1f} GiB on each of {question.ranks} ranks"
    head = f"# {model}, {mode}: {needs}. Written by tp-decoders plan.\n"
    values = _serving(question, best) if question.serve else _training(question, best, model)
    return head + yaml.safe_dump(values, sort_keys=False, default_flow_style=None)


def _parallel(question: Question, layout: Layout) -> dict[str, Any]:
    parallel: dict[str, Any] = {"tp": layout.tp}
    if not question.serve:
        parallel["dp"] = layout.dp
    parallel |= {"device": question.setup.device, "dtype": dtype_name(question.setup)}
    return parallel | ({"sequence_parallel": True} if layout.sequence_parallel else {})


def _serving(question: Question, best: Candidate) -> dict[str, Any]:
    blocks = question.streams * -(-question.sequence // 16)
    engine = {"max_sequences": question.streams, "max_step_tokens": question.setup.tokens, "kv_blocks": blocks}
    return {"parallel": _parallel(question, best.layout), "engine": engine, **_cluster(question)}


def _training(question: Question, best: Candidate, model: str) -> dict[str, Any]:
    layout, lora = best.layout, question.setup.lora
    values: dict[str, Any] = {"scratch": {"preset": model}}
    if Path(model).is_dir() or is_hub(model):
        values = {"model": model if is_hub(model) else str(full_path(model))}
    values |= {
        "corpus": {"tokens_per_sample": question.sequence, "batch_size": question.batch_size},
        "steps": 1000,
        "schedule": {
            "learning_rate": 1e-5 if lora is None else 1e-4, "kind": "cosine", "warmup_steps": 50, "total_steps": 1000,
            "final_ratio": 0.1,
        },
        "micro_batch_tokens": question.setup.tokens,
        "recompute": layout.recompute,
        "parallel": _parallel(question, layout),
    }  # fmt: skip
    if lora is not None:
        targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets or ())
        values["lora"] = {"rank": lora.rank, "alpha": lora.alpha, "targets": targets}
    return values | _cluster(question)


def _cluster(question: Question) -> dict[str, Any]:
    if question.setup.device == "cpu":
        return {"ray": {"num_cpus": question.ranks}}
    return {"ray": {"address": "auto"}, "placement": {"strategy": "PACK"}}


def dtype_name(setup: Setup) -> str:
    return str(setup.dtype).removeprefix("torch.")


def _words(targets: tuple[str, ...] | str) -> str:
    return targets if isinstance(targets, str) else ", ".join(targets)


def _write_new(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"--out {path} cannot be written: {error.strerror}; name a new file") from error
