"""A run that trains adapters: its checkpoints are PEFT adapters, from which any number of ranks goes on exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from cluster.actors.programs.train_spec import SampleConfig, TrainParallel
from cluster.training.checkpoint.checkpointer import latest_checkpoint
from cluster.training.job.run_folder import METRICS, claim_folder
from cluster.training.job.run_metrics import read_records
from parallel.errors import ConfigError
from tests.cluster.actors.programs.train_runs import STEPS, checksums, go, spec_of, write_start
from tp_decoders.model.lora_config import LoraConfig

LORA = LoraConfig(rank=4, alpha=16.0, targets="all-linear")


def test_a_run_of_adapters_is_stopped_and_goes_on_to_the_same_bits_and_opens_in_peft(
    ranks: Any, tmp_path: Path
) -> None:
    start = write_start(tmp_path / "start")
    more: dict[str, Any] = {
        "lora": LORA, "eval_every": 3, "eval_batches": 1, "samples": SampleConfig(prompts=("the cat",), max_tokens=2),
    }  # fmt: skip
    go(ranks, spec_of(start, tmp_path / "whole", TrainParallel(), **more))
    go(ranks, spec_of(start, tmp_path / "run", TrainParallel(tp=2, sequence_parallel=True), steps=3, **more))
    facts = go(ranks, spec_of(start, tmp_path / "run", TrainParallel(tp=3), recompute="full", **more))
    assert facts[0].step == 3
    assert checksums(tmp_path / "run") == checksums(tmp_path / "whole")
    records = read_records(tmp_path / "run" / METRICS)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert records[-1]["loss"] < records[0]["loss"]
    newest = latest_checkpoint(tmp_path / "run")
    assert newest is not None
    model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(start), newest)
    ids = transformers.AutoTokenizer.from_pretrained(start)("the cat sat on a mat", return_tensors="pt").input_ids
    with torch.no_grad():
        adapted = model(ids, labels=ids).loss
        with model.disable_adapter():
            assert float(adapted) < float(model(ids, labels=ids).loss)
    with pytest.raises(ConfigError, match=r"its lora differ"):
        claim_folder(tmp_path / "run", spec_of(start, tmp_path / "run", TrainParallel()).run())
