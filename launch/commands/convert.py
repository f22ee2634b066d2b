"""`tp-decoders convert`: a checkpoint in, a Hugging Face folder of safetensors out, of another type or file size.

Reads what `serve` reads (`.bin` files too, through torch's weights-only loader), the original GPT-NeoX checkpoints
(`--from deepspeed`) and OpenAI's GPT-2 ones (`--from tensorflow`). One tensor is in memory at a time. There is nothing
to be said about tensor parallelism: a checkpoint holds full tensors, whatever wrote it and whatever will read it.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.safe_text import visible
from launch.presets import find, read
from launch.training.first_weights import found_tokenizer
from parallel.errors import ConfigError

if TYPE_CHECKING:
    from tp_decoders.convert.rewrite import TensorSource
    from tp_decoders.model.config import DecoderConfig

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
FORMATS = ("huggingface", "deepspeed", "tensorflow")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", help="the checkpoint's folder, or ORG/NAME[@revision] of the Hugging Face hub")
    parser.add_argument("output", type=Path, help="the folder to write; it must be empty or new")
    parser.add_argument(
        "--from", dest="format", choices=FORMATS, default="huggingface",
        help="what the input is: a Hugging Face folder (default), an original GPT-NeoX checkpoint as DeepSpeed saved "
        "it (layer_XX-model_YY-model_states.pt), OpenAI's GPT-2 (model.ckpt, hparams.json)",
    )  # fmt: skip
    parser.add_argument(
        "--config", help="the model's shape where the input does not say it: a config.json, a GPT-NeoX .yml, a name "
        "from configs/models (as gpt-neox-20b) or a .yaml of that kind",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", help="a folder (or ORG/NAME[@revision]) with tokenizer files, or a tokenizer.json, to copy along"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's own")
    parser.add_argument(
        "--mpt-reference", choices=("auto", "transformers", "llm-foundry"), default="auto",
        help="whose meaning the options of an MPT have, kept in what is written (default: by who wrote the input)",
    )  # fmt: skip
    parser.add_argument(
        "--adapter", help="a PEFT LoRA adapter (a folder or ORG/NAME[@revision]) to merge into the weights"
    )
    parser.add_argument(
        "--allow-overflow", action="store_true",
        help="write values that --dtype cannot hold as infinite; without this they are counted and nothing is written",
    )  # fmt: skip
    parser.add_argument("--max-shard-size", default="5GB", help="of one file, as in 500MB (default 5GB)")


def run(args: argparse.Namespace) -> int:
    max_bytes = parse_size(args.max_shard_size)
    tokenizer = tokenizer_files(args.tokenizer)
    import torch

    from tp_decoders.convert.rewrite import rewrite

    with ExitStack() as stack:
        source, config, beside = open_source(args, stack)
        wanted = getattr(torch, args.dtype) if args.dtype else None
        files = beside | tokenizer
        if args.adapter is not None:
            source = _with_adapter(source, config, args.adapter, stack)
        done = rewrite(
            source, config, args.output, dtype=wanted, max_shard_size=max_bytes, files=files,
            allow_overflow=args.allow_overflow,
        )  # fmt: skip
    sizes = [path.stat().st_size for path in args.output.glob("*.safetensors")]
    shown = str(done.dtype).removeprefix("torch.")
    for line in done.lost.report():
        print(visible(f"note: {line}"))
    print(f"{args.output}: {config.model_type}, {shown}, {sum(sizes) / 1e6:.1f} MB in {len(sizes)} file(s)")
    return 0


def _with_adapter(source: TensorSource, config: DecoderConfig, adapter: str, stack: ExitStack) -> TensorSource:
    from tp_decoders.adapters.merge_adapter import MergedSource
    from tp_decoders.hub.repository import locate
    from tp_decoders.hub.snapshot_cache import ADAPTER

    return MergedSource(source, config, locate(adapter, ADAPTER), stack)


def open_source(args: argparse.Namespace, stack: ExitStack) -> tuple[TensorSource, DecoderConfig, dict[str, Path]]:
    """The tensors, the configuration, and the files to copy beside them."""
    if args.format == "deepspeed":
        return _open_deepspeed(Path(args.input), args.config)
    if args.format == "tensorflow":
        return _open_tensorflow(Path(args.input), args.config)
    from tp_decoders.convert.rewrite import HuggingFaceSource
    from tp_decoders.hub.repository import locate

    if args.config is not None:
        raise ConfigError("--config is for --from deepspeed or tensorflow: a Hugging Face folder has its config.json")
    source = HuggingFaceSource(locate(args.input), stack, args.mpt_reference)
    return source, source.config, {}


def _open_deepspeed(folder: Path, given: str | None) -> tuple[TensorSource, DecoderConfig, dict[str, Path]]:
    from tp_decoders.convert.deepspeed import DeepSpeedSource, find_layers, vocab_rows
    from tp_decoders.convert.neox_settings import NAMED, hf_of_settings, is_neox_settings
    from tp_decoders.registry import config_from_hf

    step = find_layers(folder)
    where = _config_file(given) if given else _settings_beside(step)
    values = _values(where)
    if is_neox_settings(values):
        values = hf_of_settings(values, vocab_rows(step), str(where))
    config = config_from_hf({**NAMED, **values})
    return DeepSpeedSource(step, config), config, {}


def _open_tensorflow(folder: Path, given: str | None) -> tuple[TensorSource, DecoderConfig, dict[str, Path]]:
    from tp_decoders.convert.gpt2_tensorflow import Gpt2TensorFlowSource, hf_of_hparams, vocabulary_files
    from tp_decoders.registry import config_from_hf

    hf = dict(_values(_config_file(given))) if given else hf_of_hparams(folder)
    config = config_from_hf(hf)
    return Gpt2TensorFlowSource(folder, config), config, vocabulary_files(folder)


def _config_file(given: str) -> Path:
    path = Path(given)
    if path.is_dir():
        path = path / "config.json"
    return path if path.suffix == ".json" else find(given, "models")


def _settings_beside(step: Path) -> Path:
    """The configuration that lies with a checkpoint: config.json, or the one .yml of its configs/ folder."""
    places = (step, step.parent)
    found = [place / "config.json" for place in places if (place / "config.json").is_file()]
    found += [path for place in places for path in sorted((place / "configs").glob("*.yml"))]
    if len(found) != 1:
        held = ", ".join(map(str, found)) or "none found"
        raise ConfigError(
            f"{step} does not say the model's shape by one config.json or configs/*.yml ({held}); give --config, as in "
            "--config gpt-neox-20b"
        )
    return found[0]


def _values(path: Path) -> Mapping[str, Any]:
    if path.suffix != ".json":
        return read(path).values
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--config {path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path} holds {type(values).__name__}; a configuration is a JSON object")
    return values


def tokenizer_files(where: str | None) -> dict[str, Path]:
    """The files to copy, by the name they get."""
    if where is None:
        return {}
    from tp_decoders.files.json_files import read_json_object
    from tp_decoders.hub.repository import locate
    from tp_decoders.hub.snapshot_cache import TOKENIZER

    given = locate(where, TOKENIZER)
    if given.is_file():
        read_json_object(given)  # a checkpoint with a tokenizer that is none would be found out much later
        return {"tokenizer.json": given}
    return found_tokenizer(given)


def parse_size(text: str) -> int:
    """Bytes of '500MB' and the like."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B?)", text.strip().upper())
    unit = found[2] if found else None
    if found is None or unit not in UNITS or float(found[1]) * UNITS[unit] < 1:
        raise ConfigError(f"--max-shard-size is {text!r}; write a number and a unit, as in 500MB or 5GB")
    return int(float(found[1]) * UNITS[unit])
