"""What the transformers of the Python that runs this makes of checkpoints. Imports nothing of this project.

    python reference_models.py plan.json

The plan is a list of {"do": "make", "config": {...}, "readable": {...}, "folder": path} and {"do": "read", "folder":
path}. "make" draws weights by their names, so that every version draws the same, and leaves the folder twice:
published/ with config as its config.json, saved/ as this version writes what it read from readable. Both leave the
logits of TOKENS in logits.safetensors.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

TOKENS = [5, 3, 60, 2, 44, 17, 17, 9, 0, 31, 8, 26]


def make(config: dict[str, Any], readable: dict[str, Any], folder: Path) -> None:
    published = folder / "published"
    published.mkdir(parents=True)
    (published / "config.json").write_text(json.dumps(readable))
    read = transformers.AutoConfig.from_pretrained(published, trust_remote_code=False)
    (published / "config.json").write_text(json.dumps(config))
    model = transformers.AutoModelForCausalLM.from_config(read, trust_remote_code=False, attn_implementation="eager")
    model = model.float().eval()
    for name, parameter in model.named_parameters():
        parameter.data = drawn(name, parameter)
    model.save_pretrained(folder / "saved")
    (folder / "saved" / "model.safetensors").rename(published / "model.safetensors")
    (folder / "saved" / "model.safetensors").symlink_to(published / "model.safetensors")
    answer(model, folder)


def drawn(name: str, parameter: torch.Tensor) -> torch.Tensor:
    """Of a size at which every part of a model tells in its logits."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    fresh = torch.randn(parameter.shape, generator=generator)
    return 1.0 + 0.2 * fresh if parameter.dim() == 1 and name.endswith("weight") else 0.15 * fresh


def read(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=False, attn_implementation="eager", dtype=torch.float32
    )
    answer(model.eval(), folder)


@torch.no_grad()
def answer(model: Any, folder: Path) -> None:
    save_file({"logits": model(torch.tensor([TOKENS])).logits[0].float()}, folder / "logits.safetensors")


def main() -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    for step in json.loads(Path(sys.argv[1]).read_text()):
        folder = Path(step["folder"])
        if step["do"] == "make":
            make(step["config"], step["readable"], folder)
        else:
            read(folder)


if __name__ == "__main__":
    main()
