"""Checkpoints as one environment makes them, saved here once more, and read by that environment again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from parallel.attention.forward_pass import Pass
from tests.outside.files.environments import Environment
from tests.outside.files.published import readable
from tests.outside.files.reference_models import TOKENS
from tp_decoders import load, save

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Made:
    """By name: NAME/published with config.json as given, NAME/saved as transformers wrote it, NAME/ours as we did."""

    folder: Path
    names: tuple[str, ...]

    def at(self, name: str, *parts: str) -> Path:
        return self.folder.joinpath(str(self.names.index(name)), *parts)

    def logits(self, name: str, *parts: str) -> torch.Tensor:
        return load_file(self.at(name, *parts, "logits.safetensors"))["logits"]


def make(environment: Environment, folder: Path, configs: Mapping[str, dict[str, Any]]) -> Made:
    made = Made(folder, tuple(configs))
    steps = []
    for name, hf in configs.items():
        steps.append({"do": "make", "config": hf, "readable": readable(hf), "folder": str(made.at(name))})
    environment.ask("reference_models.py", steps, folder)
    for name in configs:
        save(load(made.at(name, "published")), made.at(name, "ours"))
    again = [{"do": "read", "folder": str(made.at(name, "ours"))} for name in configs]
    environment.ask("reference_models.py", again, folder)
    return made


def computed(folder: Path, **how: Any) -> torch.Tensor:
    """Our logits."""
    with torch.no_grad():
        return load(folder, **how)(torch.tensor(TOKENS), Pass.packed([len(TOKENS)]))


def check_logits(made: Made, name: str) -> None:
    """The published file and the one this transformers saved give one result, which is its own."""
    wanted = made.logits(name)
    got = computed(made.at(name, "published"), mpt_reference="transformers")  # whose logits are compared here
    assert float((got - wanted).abs().max()) <= TOLERANCE * float(wanted.abs().max())
    assert torch.equal(computed(made.at(name, "saved")), got), "as this version of transformers saved it"


def check_saved_here(made: Made, name: str) -> None:
    assert torch.equal(made.logits(name, "ours"), made.logits(name)), "transformers reads what was saved here"
