"""OpenAI's GPT-2 as it was released: a TensorFlow checkpoint, hparams.json, and the vocabulary under its first names.

    model/h0/attn/c_attn/w [1, in, out]  ->  transformer.h.0.attn.c_attn.weight [in, out]       .../g, .../b: norms

Optimiser variables of a fine-tuned checkpoint are passed over; any other variable under model/ is an error.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.errors import CheckpointError, ConfigError
from tp_decoders.convert.rewrite import tensor_shapes
from tp_decoders.convert.tensorflow_files import TensorFlowFiles
from tp_decoders.model.config import DecoderConfig

MODEL_TYPE = "gpt2"
HPARAMS = {
    "n_vocab": "vocab_size",
    "n_ctx": "n_positions",
    "n_embd": "n_embd",
    "n_head": "n_head",
    "n_layer": "n_layer",
}
VOCABULARY = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}
END = "<|endoftext|>"
SLOTS = re.compile(r".*/(Adam|Adam_1|Momentum|RMSProp|RMSProp_1|Adagrad|ExponentialMovingAverage)")


def find_prefix(folder: Path) -> Path:
    """The checkpoint of a folder: what its `checkpoint` file names, or its only .index file."""
    note = folder / "checkpoint"
    named = re.search(r'^model_checkpoint_path: "(.+)"', note.read_text(), re.MULTILINE) if note.is_file() else None
    if named:
        return folder / Path(named[1]).name
    found = sorted(folder.glob("*.index"))
    if len(found) != 1:
        held = ", ".join(path.name for path in found) or "none"
        raise CheckpointError(
            f"{folder} should hold one TensorFlow checkpoint (NAME.index, NAME.data-...), or a file `checkpoint` that "
            f"names the one; its .index files: {held}"
        )
    return found[0].with_suffix("")


def hf_of_hparams(folder: Path) -> dict[str, Any]:
    """The contents of config.json, of hparams.json; what the original code fixed is added."""
    hparams = _read_json(folder / "hparams.json", "or give --config with a config.json")
    wrong = sorted(set(HPARAMS) - {name for name, value in hparams.items() if isinstance(value, int)})
    if wrong:
        raise CheckpointError(f"{folder / 'hparams.json'} gives no number for {', '.join(wrong)}")
    end = _end_of_text(folder, hparams["n_vocab"])
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": MODEL_TYPE,
        **{theirs: hparams[name] for name, theirs in HPARAMS.items()},
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": end,
        "eos_token_id": end,
    }


def vocabulary_files(folder: Path) -> dict[str, Path]:
    """The tokenizer's files that are there, by the names transformers gives them."""
    return {name: folder / original for original, name in VOCABULARY.items() if (folder / original).is_file()}


def _end_of_text(folder: Path, n_vocab: int) -> int | None:
    encoder = folder / "encoder.json"
    known = _read_json(encoder, "fetch it again").get(END) if encoder.is_file() else 50256
    return known if isinstance(known, int) and known < n_vocab else None


def _read_json(path: Path, otherwise: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); fetch it, {otherwise}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} should hold a JSON object, not {type(values).__name__}")
    return values


class Gpt2TensorFlowSource:
    """The variables of such a checkpoint under transformers' names. Misfits are found when it is made."""

    def __init__(self, folder: Path, config: DecoderConfig) -> None:
        if config.model_type != MODEL_TYPE:
            raise ConfigError(
                f"{folder}: TensorFlow checkpoints are read of GPT-2 only; the configuration is of {config.model_type}"
            )
        self.folder = folder
        self._files = TensorFlowFiles(find_prefix(folder))
        self._shapes = tensor_shapes(config)
        self._check()
        self.dtype: torch.dtype = self._files.variables[original_name("transformer.wte.weight")].dtype

    def read(self, name: str) -> Tensor:
        """A full tensor; the leading 1 of the matrices is dropped."""
        return self._files.read(original_name(name)).reshape(self._shapes[name])

    def _check(self) -> None:
        index, variables = self._files.index, self._files.variables
        wanted = {original_name(name): shape for name, shape in self._shapes.items()}
        missing = sorted(set(wanted) - set(variables))
        extra = sorted(
            name for name in set(variables) - set(wanted) if name.startswith("model/") and not SLOTS.fullmatch(name)
        )
        if missing or extra:
            raise CheckpointError(
                f"{index} does not hold the variables of this GPT-2; missing: {', '.join(missing) or 'none'}; "
                f"unexpected: {', '.join(extra) or 'none'}; see that hparams.json belongs to it"
            )
        for name, shape in wanted.items():
            variable = variables[name]
            given = variable.shape[1:] if name.endswith("/w") and variable.shape[:1] == (1,) else variable.shape
            if given != shape or not variable.dtype.is_floating_point:
                raise CheckpointError(
                    f"{index}: {name} is {list(variable.shape)} of {str(variable.dtype)[6:]}, the configuration asks "
                    f"for {list(shape)}; see that hparams.json belongs to it"
                )


def original_name(name: str) -> str:
    """transformers' name in the original code's words."""
    *path, leaf = name.removeprefix("transformer.").split(".")
    if path[0] in ("wte", "wpe"):
        return f"model/{path[0]}"
    if path[0] == "h":
        path = [f"h{path[1]}", *path[2:]]
    is_norm = path[-1].startswith("ln_")
    return "/".join(["model", *path, "b" if leaf == "bias" else "g" if is_norm else "w"])
