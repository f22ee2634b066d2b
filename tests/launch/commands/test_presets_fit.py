"""Every training preset fits the GPUs that it names, by the planner, and is of the model that it is called after."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.training.memory.estimate import Layout, Setup, training_memory
from cluster.training.step.flops import num_parameters
from launch.presets import CONFIGS, Layer, build, find, read
from launch.training.train_config import TrainConfig
from tp_decoders import build as build_model
from tp_decoders.model.config import DecoderConfig
from tp_decoders.registry import config_from_hf

NAMED = re.compile(r"# For (\d+) GPUs of (\d+) GiB, (\d+) to a node")
PRESETS = sorted(CONFIGS.glob("training/*.yaml"))
LAPTOPS = [path for path in PRESETS if path.stem.startswith("laptop")]
MILLIONS = {
    "pythia-70m": 70, "pythia-160m": 162, "pythia-410m": 405, "pythia-1b": 1012, "pythia-1.4b": 1415,
    "pythia-2.8b": 2775, "pythia-6.9b": 6857, "pythia-12b": 11846, "gpt-neox-20b": 20555, "gpt2": 124,
    "gpt2-medium": 355, "gpt2-large": 774, "gpt2-xl": 1558, "santacoder": 1125, "starcoder": 15518,
    "mpt-7b": 6649, "mpt-30b": 29958,
}  # fmt: skip
"""Published numbers of parameters (those of Pythia in Biderman et al. 2023, table 1)."""


def configuration(path: Path) -> TrainConfig:
    given = {"out": "run", "corpus": {"path": "text.txt"}}
    config: TrainConfig = build(TrainConfig, [read(path), Layer("test", given)])
    return config


def model_of(config: TrainConfig) -> DecoderConfig:
    assert config.scratch.preset is not None
    return config_from_hf(dict(read(find(config.scratch.preset, "models")).values))


def setup_of(config: TrainConfig) -> Setup:
    parallel = config.parallel
    share = -(-config.corpus.batch_size // parallel.dp) * config.corpus.tokens_per_sample
    return Setup(
        tokens=config.micro_batch_tokens or share, dtype=getattr(torch, parallel.dtype or "float32"),
        device=parallel.device, numerics=parallel.numerics, lora=config.lora,
    )  # fmt: skip


@pytest.mark.parametrize("path", [p for p in PRESETS if p not in LAPTOPS], ids=lambda path: path.stem)
def test_a_preset_fits_the_gpus_that_it_names(path: Path) -> None:
    config, named = configuration(path), NAMED.search(path.read_text(encoding="utf-8"))
    assert named is not None, "it says for which GPUs it is"
    gpus, memory, per_node = (int(number) for number in named.groups())
    parallel = config.parallel
    assert parallel.tp * parallel.dp == gpus
    assert parallel.device == "cuda" and parallel.dtype == "bfloat16"
    drops = config.dropout and model_of(config).dropout.attention > 0
    assert not drops, "the planner takes attention for flash, which drops nothing"
    assert parallel.tp % per_node == 0 or per_node % parallel.tp == 0
    layout = Layout(
        tp=parallel.tp, dp=parallel.dp, recompute=config.recompute, sequence_parallel=parallel.sequence_parallel
    )
    assert training_memory(model_of(config), layout, setup_of(config)).total <= 0.95 * memory * 2**30
    assert setup_of(config).tokens >= config.corpus.tokens_per_sample, "a sample is not cut"
    assert config.schedule.total_steps == config.steps


@pytest.mark.parametrize("path", LAPTOPS, ids=lambda path: path.stem)
def test_a_laptop_preset_fits_into_a_gigabyte_a_rank(path: Path) -> None:
    config = configuration(path)
    layout = Layout(tp=config.parallel.tp, dp=config.parallel.dp, recompute=config.recompute)
    assert training_memory(model_of(config), layout, setup_of(config)).total <= 2**30


@pytest.mark.parametrize("name", MILLIONS)
def test_a_model_preset_has_the_published_number_of_parameters(name: str) -> None:
    shape: dict[str, Any] = dict(read(find(name, "models")).values)
    millions = num_parameters(build_model(config_from_hf(shape), device="meta")) / 1e6
    assert millions == pytest.approx(MILLIONS[name], rel=0.01)


def test_every_published_model_has_a_training_preset() -> None:
    assert {*MILLIONS, "gpt-neox-20b-lora", "gpt-neox-japanese-2.7b"} <= {path.stem for path in PRESETS}
