"""Small training runs for tests: the real program of a rank, on the test processes instead of Ray's."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import torch

from cluster.actors.group.placement import Place
from cluster.actors.group.worker import Phases
from cluster.actors.programs.train_rank import TrainRank
from cluster.actors.programs.train_spec import CorpusConfig, TrainFacts, TrainParallel, TrainSpec
from cluster.training.checkpoint.checkpointer import latest_checkpoint
from cluster.training.data.batches.eval_split import SplitRule
from cluster.training.job.run_folder import claim_folder, folder_origin
from cluster.training.step.lr_schedule import Schedule
from launch.training.first_weights import copy_tokenizer, write_random
from parallel.ranks.group import Group
from tests.ranks import free_address

TOKENIZER = Path(__file__).resolve().parents[3] / "data" / "tokenizers" / "gpt2"
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "sang", "of", "the", "sea", "all", "night"]
SHAPE = {
    "model_type": "gpt2", "vocab_size": 50257, "n_positions": 64, "n_embd": 12, "n_layer": 2, "n_head": 3,
    "eos_token_id": 50256,
}  # fmt: skip
STEPS = 6


def write_start(folder: Path, **shape: Any) -> Path:
    """First weights, a tokenizer and a text to learn."""
    write_random(SHAPE | shape, folder)
    copy_tokenizer(TOKENIZER, folder)
    lines = (" ".join(WORDS[(7 * n * k) % len(WORDS)] for k in range(1, 12)) for n in range(1, 120))
    (folder / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def spec_of(start: Path, out: Path, layout: TrainParallel, **more: Any) -> TrainSpec:
    corpus = CorpusConfig(
        path=str(start / "text.txt"), separator="\n", tokens_per_sample=32, batch_size=4,
        split=SplitRule(eval_fraction=0.2),
    )  # fmt: skip
    given: dict[str, Any] = {
        "model": str(start), "origin": folder_origin(start), "out": str(out), "corpus": corpus, "steps": STEPS,
        "save_every": 3, "schedule": Schedule(learning_rate=1e-2, warmup_steps=1, total_steps=STEPS),
        "parallel": layout, "peak_flops": 1e9,
    }  # fmt: skip
    return TrainSpec(**given | more)


def go(ranks: Any, spec: TrainSpec) -> list[TrainFacts]:
    """Runs to the last step and its checkpoint."""
    claim_folder(Path(spec.out), spec.run())
    facts: list[TrainFacts] = ranks(spec.parallel.world, run_rank, spec, free_address())
    return facts


def go_here(spec: TrainSpec) -> TrainFacts:
    """The same for a run of one rank, in this process."""
    claim_folder(Path(spec.out), spec.run())
    return run_rank(Group.single(), spec, free_address())


def run_rank(group: Group, spec: TrainSpec, address: str) -> TrainFacts:
    place = Place(
        rank=group.rank, world=group.size, node="127.0.0.1", local_rank=group.rank, local_size=64, address=address
    )  # more ranks than cores: none is pinned
    program = TrainRank(spec, place, Phases())
    ended = threading.Event()
    try:
        facts = program.start()
        threading.Thread(target=_stop_when_saved, args=(program, spec, ended), daemon=True).start()
        program.run()
        assert isinstance(facts, TrainFacts)
        return facts
    finally:
        ended.set()
        program.close()


def _stop_when_saved(program: TrainRank, spec: TrainSpec, ended: threading.Event) -> None:
    while not ended.is_set():
        newest = latest_checkpoint(Path(spec.out))
        if newest is not None and newest.name == f"step-{spec.steps:08d}":
            program.stop()
            return
        time.sleep(0.02)


def checksums(out: Path) -> dict[str, str]:
    """Of every file of a finished run's checkpoint."""
    newest = latest_checkpoint(out)
    assert newest is not None and newest.name == f"step-{STEPS:08d}"
    sums: dict[str, str] = json.loads((newest / "training" / "state.json").read_text())["sha256"]
    return sums


def weights(out: Path) -> torch.Tensor:
    """All weights and moments of a run's newest checkpoint, side by side."""
    from safetensors.torch import load_file

    newest = latest_checkpoint(out)
    assert newest is not None
    found = []
    for path in sorted(newest.rglob("*.safetensors")):
        found += [tensor.flatten().float() for _, tensor in sorted(load_file(path).items())]
    return torch.cat(found)
