"""Faults of a real job: a frozen rank is named and the job goes on; a poison batch ends it at the second try."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.training.first_weights import copy_tokenizer, write_random
from tests.launch.training.kill_training import TOKENIZER, Job
from tp_decoders.text.tokenizer import load_tokenizer

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
NEOX = {
    "model_type": "gpt_neox", "vocab_size": 50257, "eos_token_id": 50256, "hidden_size": 12, "num_hidden_layers": 1,
    "num_attention_heads": 3, "intermediate_size": 48, "max_position_embeddings": 64, "rotary_pct": 0.5,
    "tie_word_embeddings": False,
}  # fmt: skip
NAMED_WITHIN_S = 200.0
"""Ten on a machine that has time; this is for one that has none."""


def command(folder: Path, text: str, *more: str) -> list[str]:
    """A job on weights that cannot read the word zebra."""
    write_random(NEOX, folder / "start")
    copy_tokenizer(TOKENIZER, folder / "start")
    tokenizer = load_tokenizer(folder / "start")
    assert tokenizer is not None
    path = folder / "start" / "model.safetensors"
    tensors = load_file(path)
    tensors["gpt_neox.embed_in.weight"][torch.tensor(tokenizer.encode(" zebra"))] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    (folder / "text.txt").write_text(text, encoding="utf-8")
    settings = [
        f"model={folder / 'start'}", f"corpus.path={folder / 'text.txt'}", f"out={folder / 'out'}",
        "corpus.tokens_per_sample=32", "corpus.batch_size=4", "corpus.split.eval_fraction=0.0", "eval_every=null",
        "samples.prompts=[]", "peak_flops=1.0e+9", "plot=false", "save_every=2",
    ]  # fmt: skip
    return ["train", "--config", "laptop", *settings, *more]


def test_a_batch_that_gives_no_numbers_ends_the_job_at_its_second_try(tmp_path: Path) -> None:
    job = Job(command(tmp_path, "the cat sat on a zebra and sang " * 200, "parallel.tp=1"), tmp_path / "out")
    status, said = job.wait()
    assert status == 1 and said.count("training gpt_neox") == 2, "five restarts are for lost ranks"
    last = said.strip().splitlines()[-1]
    assert "step 1, batch 1 of the data (epoch 0, position 0, samples 0 to 3): the loss is nan" in last
    assert "the loss of documents 0, 0, 0, 0 is not finite; first seen by rank 0; no weight was changed" in last


def test_a_frozen_rank_is_named_and_the_job_goes_on_without_it(tmp_path: Path) -> None:
    job = Job(command(tmp_path, "the cat sat on a mat and sang " * 400, "steps=100000"), tmp_path / "out")
    try:
        job.await_step(3)
        frozen = job.ranks()[1]
        os.kill(frozen, signal.SIGSTOP)
        began = time.monotonic()
        line = job.await_line("the run stopped: ")
        assert time.monotonic() - began < NAMED_WITHIN_S
        assert "gives no sign of life" in line and "it does so by itself in 0 s (restart 1)" in line
        job.await_step(job.step() + 2)
        job.signal(signal.SIGTERM)
        status, said = job.wait()
        assert status == 0 and "the same command goes on from there" in said
        assert frozen not in job.ranks()
    finally:
        if job.running:
            job.kill()
