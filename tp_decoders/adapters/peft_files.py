"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, under the checkpoint's module names.

    base_model.model.transformer.h.0.attn.c_attn.lora_A.weight   [R, inputs]   also where W is stored transposed
    base_model.model.transformer.h.0.attn.c_attn.lora_B.weight   [outputs, R]

Every rank reads its own slices; saving gathers one matrix at a time on rank 0. Which layers an adapter has is read
from its tensors. What PEFT can do beyond plain LoRA (DoRA, biases, modules trained whole, ...) is refused by the name
of its setting.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from parallel.errors import CheckpointError, ConfigError
from parallel.sharding.released_weight import values
from parallel.sharding.rules import full_shape_of, rule_of, sharded
from tp_decoders.adapters.lora import detach, ends_with, merge, place, their_module
from tp_decoders.checkpoint.load_save import agree, fill, full_tensor
from tp_decoders.files.tensor_files import PickledFile, SafetensorsFile, TensorFile
from tp_decoders.hub.repository import locate
from tp_decoders.hub.snapshot_cache import ADAPTER, cached_of
from tp_decoders.model.adapted_layers import adapted, linears
from tp_decoders.model.decoder import Decoder
from tp_decoders.model.lora_config import LoraConfig
from tp_decoders.registry import family_of

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
FACTOR = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
WHOLE = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+?)(\.base_layer)?\.weight")
INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways to begin that leave the base model as it was; the others (pissa, olora, ...) need a changed one."""
HARMLESS = (
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "megatron_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
)  # fmt: skip
"""Settings that the tensors say themselves, or that change nothing once an adapter is trained."""


def load_adapter(model: Decoder, folder: str | Path, trainable: bool = False) -> None:
    """Puts a saved adapter beside the model's weights; frozen, as everything else is then, unless it is to train on."""
    folder = locate(folder, ADAPTER)
    config = read_adapter_config(folder)
    with ExitStack() as stack:
        file = open_adapter(folder, stack)
        ranks = factor_ranks(model, file, config, folder, lambda key, theirs: _is_unchanged(model, file, key, theirs))
        place(model, config, ranks)
        try:
            for key, _, parameter in adapter_tensors(model):
                stored = next(name for name in spellings(model, key) if name in file.shapes)
                fill(parameter, file, stored, False, model.group.rank)
                parameter.requires_grad_(trainable)
        except BaseException:
            detach(model)
            raise


def load_merged(model: Decoder, folder: str | Path) -> None:
    """Adds a saved adapter into the model's weights for good: what is left is a plain model."""
    load_adapter(model, folder)
    merge(model, keep_base=False)
    detach(model)


def read_adapter_config(folder: str | Path) -> LoraConfig:
    """The shape of a saved adapter; an error that names the setting where it is not plain LoRA."""
    path = Path(folder) / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); give the folder of a PEFT adapter") from error
    if not isinstance(content, dict) or content.get("peft_type") != "LORA":
        raise CheckpointError(f"{path} does not describe a LoRA adapter; its peft_type should be 'LORA'")
    fields = dict(content)
    if fields.pop("init_lora_weights", True) not in INITS:
        raise CheckpointError(
            f"{path}: init_lora_weights {content['init_lora_weights']!r} changes the base model; convert the adapter "
            "to plain LoRA when saving it in PEFT (path_initial_model_for_weight_conversion)"
        )
    targets = fields.get("target_modules")
    try:
        config = LoraConfig(
            rank=int(fields.pop("r", 8)), alpha=float(fields.pop("lora_alpha", 8)),
            dropout=float(fields.pop("lora_dropout", 0.0)), rslora=bool(fields.pop("use_rslora", False)),
            targets=targets if isinstance(targets, str) else tuple(targets or ()) or None,
            rank_pattern=dict(fields.pop("rank_pattern", None) or {}),
            alpha_pattern=dict(fields.pop("alpha_pattern", None) or {}),
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    _refuse_more(path, fields)
    return config


def _refuse_more(path: Path, fields: Mapping[str, Any]) -> None:
    plain = {"peft_type": "LORA", "bias": "none"}
    more = [f"{name} {v!r}" for name, v in fields.items() if v and name not in HARMLESS and plain.get(name) != v]
    if more:
        raise CheckpointError(f"{path} asks for more than LoRA on linear layers: {', '.join(more)}; not supported")


def open_adapter(folder: Path, stack: ExitStack) -> TensorFile:
    if (folder / WEIGHTS).is_file():
        return SafetensorsFile(folder / WEIGHTS, stack)
    if (folder / PICKLED).is_file():
        return PickledFile(folder / PICKLED)
    raise CheckpointError(f"{folder} has neither {WEIGHTS} nor {PICKLED}; give the folder of a PEFT adapter")


def factor_ranks(
    model: Decoder, file: TensorFile, config: LoraConfig, folder: Path, is_bases: Callable[[str, str], bool]
) -> dict[str, int]:
    """{our name: rank} of the layers that the file has factors for, checked against the model and the config.
    `is_bases` says of a whole weight, by its key and the checkpoint's name for it, whether it is the base model's own:
    PEFT adds the embedding to an adapter of the head.
    """
    names, layers = family_of(model.config.model_type).names, linears(model)
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    wrong = []
    for key, shape in file.shapes.items():
        match = FACTOR.fullmatch(key)
        line = names.find(f"{match['module']}.weight") if match else None
        ours = (line.ours or "").removesuffix(".weight") if line else ""
        if match and ours in layers:
            found.setdefault(ours, {})[match["factor"]] = shape
        elif not ((whole := _whole_weight(model, file, key)) and is_bases(key, whole)):
            wrong.append(f"{key} belongs to no linear layer of this model")
    for ours, shapes in found.items():
        d_out, d_in = full_shape_of(layers[ours].weight)
        rank = config.rank_of(their_module(model, ours))
        wanted = {"A": (rank, d_in), "B": (d_out, rank)}
        wrong += [f"{ours} has {shapes}, not {wanted}"] if shapes != wanted else []
    if wrong or not found:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(f"{folder} is no adapter of this model: {'; '.join(wrong[:3]) or 'it is empty'}{more}")
    return {ours: config.rank_of(their_module(model, ours)) for ours in found}


def _whole_weight(model: Decoder, file: TensorFile, key: str) -> str | None:
    """The checkpoint's name of the weight that a tensor could be, whole."""
    match, names = WHOLE.fullmatch(key), family_of(model.config.model_type).names
    line = names.find(f"{match['module']}.weight") if match else None
    wanted = dict(model.named_parameters(remove_duplicate=False))
    if line is None or line.ours not in wanted or line.transposed:
        return None
    every = dict(model.named_parameters())
    same = next((name for name in every if every[name] is wanted[line.ours]), line.ours)  # the embedding's, where tied
    return names.theirs(same)[1] if full_shape_of(wanted[line.ours]) == file.shapes[key] else None


def _is_unchanged(model: Decoder, file: TensorFile, key: str, theirs: str) -> bool:
    """Whether a whole weight of an adapter's file equals the model's."""
    line = family_of(model.config.model_type).names.find(theirs)
    assert line is not None and line.ours is not None, "found before"
    parameter = dict(model.named_parameters())[line.ours]
    copy = sharded(full_shape_of(parameter), rule_of(parameter), model.group.rank, parameter.dtype, parameter.device)
    fill(copy, file, key, False, model.group.rank)
    return torch.equal(copy, values(parameter))


def adapter_tensors(model: Decoder) -> list[tuple[str, str, nn.Parameter]]:
    """Every factor, under PEFT's name for it and under ours."""
    return [
        (f"{PREFIX}{their_module(model, name)}.lora_{factor.upper()}.weight", f"{name}.adapter.{factor}", parameter)
        for name, _, adapter in adapted(model)
        for factor, parameter in adapter.named_parameters()
    ]


def spellings(model: Decoder, key: str) -> tuple[str, str]:
    """A key with and without the base model's prefix: adapters of the bare model leave it out."""
    return key, PREFIX + key.removeprefix(PREFIX).removeprefix(family_of(model.config.model_type).names.prefix)


def adapter_config(model: Decoder) -> dict[str, Any]:
    """What adapter_config.json says of the model's adapter."""
    config = model.lora
    if config is None:
        raise ConfigError("the model has no adapter to save; attach or load one first")
    base = cached_of(model.source) if model.source else None
    names = family_of(model.config.model_type).names
    flips = any(names.theirs(f"{name}.weight")[0].transposed for name, _, _ in adapted(model))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.repo if base else str(model.source) if model.source else None,
        "revision": base.commit if base else None,
        "r": config.rank,
        "lora_alpha": _whole(config.alpha),
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "target_modules": _target_modules(model),
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": {name: _whole(alpha) for name, alpha in config.alpha_pattern.items()},
        "bias": "none",
        "fan_in_fan_out": flips,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }


def _whole(alpha: float) -> float:
    return int(alpha) if alpha == int(alpha) else alpha


def _target_modules(model: Decoder) -> list[str]:
    """The shortest ends of names that PEFT matches with the adapted modules and no others."""
    every = {their_module(model, name) for name in linears(model)}
    chosen = {their_module(model, name) for name, _, _ in adapted(model)}
    ends = set()
    for module in chosen:
        parts = module.split(".")
        candidates = (".".join(parts[start:]) for start in reversed(range(len(parts))))
        ends.add(next(end for end in candidates if {name for name in every if ends_with(name, end)} <= chosen))
    return sorted(ends)


def save_adapter(model: Decoder, folder: str | Path) -> None:
    """Writes the folder that PEFT reads, complete or not at all; it must be new or empty. All ranks call this."""
    folder, config, tensors = Path(folder), adapter_config(model), {}
    for key, _, parameter in adapter_tensors(model):
        full = full_tensor(parameter, model.group)
        if full is not None:
            tensors[key] = full.cpu().contiguous()
    agree(model.group, _write(folder, config, tensors) if model.group.rank == 0 else None)


def _write(folder: Path, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> str | None:
    """What went wrong, if anything did."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        return f"{folder} exists and is not an empty folder; save to a new one"
    draft = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    try:
        draft.mkdir(parents=True)
        save_file(tensors, draft / WEIGHTS, metadata={"format": "pt"})
        (draft / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(draft, folder)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        return f"cannot write an adapter to {folder}: {error}"
    return None
