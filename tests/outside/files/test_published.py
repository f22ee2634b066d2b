"""Well-known checkpoints' settings: read as published and as each transformers writes them, the same logits; and what
is saved here is read by each transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from parallel.attention import Causal
from tests.outside.files.environments import ENVIRONMENTS, Environment
from tests.outside.files.published import PUBLISHED, readable, small
from tests.outside.files.reference_models import TOKENS
from tp_decoders import load, save
from tp_decoders.registry import config_from_hf

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Made:
    """Where one environment made the checkpoints and read again what was saved here."""

    folder: Path
    environment: Environment

    def logits(self, name: str, *parts: str) -> torch.Tensor:
        return load_file(self.folder.joinpath(place(name), *parts, "logits.safetensors"))["logits"]


def place(name: str) -> str:
    return str(list(PUBLISHED).index(name))


def computed(folder: Path, **how: Any) -> torch.Tensor:
    with torch.no_grad():
        return load(folder, **how)(torch.tensor(TOKENS), torch.arange(len(TOKENS)), Causal([len(TOKENS)]))


@pytest.fixture(scope="module", params=ENVIRONMENTS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """All checkpoints by one environment; each saved here once more and read by it again."""
    folder, environment = tmp_path_factory.mktemp("published"), request.param
    steps = []
    for name, hf in PUBLISHED.items():
        settings = {"config": small(hf), "readable": readable(small(hf))}
        steps.append({"do": "make", **settings, "folder": str(folder / place(name))})
    environment.ask("reference_models.py", steps, folder)
    for name in PUBLISHED:
        save(load(folder / place(name) / "published"), folder / place(name) / "ours")
    again = [{"do": "read", "folder": str(folder / place(name) / "ours")} for name in PUBLISHED]
    environment.ask("reference_models.py", again, folder)
    return Made(folder, environment)


@pytest.mark.parametrize("name", PUBLISHED)
def test_its_logits_are_those_of_transformers(name: str, made: Made) -> None:
    wanted = made.logits(name)
    got = computed(made.folder / place(name) / "published", mpt_reference="transformers")  # one has another meaning
    assert float((got - wanted).abs().max()) <= TOLERANCE * float(wanted.abs().max())
    assert torch.equal(computed(made.folder / place(name) / "saved"), got), "as this version of transformers saved it"


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_reads_what_was_saved_here(name: str, made: Made) -> None:
    assert torch.equal(made.logits(name, "ours"), made.logits(name))


@pytest.mark.parametrize("name", PUBLISHED)
def test_its_own_sizes_are_understood(name: str) -> None:
    hf = PUBLISHED[name]
    config = config_from_hf(hf)
    assert config.vocab_size == hf["vocab_size"] and config.d_model == config.n_heads * config.head_dim
