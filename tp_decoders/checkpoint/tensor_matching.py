"""Which tensor of a checkpoint is which parameter, and in what type they are meant: by names, shapes and types alone.

Read as transformers reads: a tied pair may be stored under either name or both, buffers of old versions are passed
over, what nobody asks for is named in one warning. What is missing or cannot be the parameter is one error.
No values are read here, save to compare the two halves of a tied pair.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from parallel.errors import CheckpointError
from parallel.sharding.rules import full_shape_of
from tp_decoders.files.tensor_files import Checkpoint
from tp_decoders.model.config import DecoderConfig
from tp_decoders.model.decoder import Decoder
from tp_decoders.model.task_config import CAUSAL
from tp_decoders.model.tensor_names import TASK_HEAD, NameMap
from tp_decoders.tasks.task_settings import task_of

log = logging.getLogger(__name__)

EMBEDDING = "embed.weight"
HEAD_WEIGHT = "head.linear.weight"
SHOWN = 24
"""Names that a warning or an error lists; of the rest it gives the number."""
ROWS = 4096
Sources = dict[str, tuple[str, bool]]
"""Where each parameter lies in the checkpoint: (its name there, whether it is stored transposed)."""


def match_tensors(model: Decoder, checkpoint: Checkpoint, names: NameMap) -> Sources:
    """The tensors of the model's parameters; of the model only shapes are used, so it may be on the meta device."""
    wanted = dict(model.named_parameters())
    sources: Sources = {}
    extra, wrong = [], []
    for theirs in checkpoint.shapes:
        found = names.find(theirs)
        if found is not None and found.ours in wanted:
            doubt = _doubt(wanted[found.ours], checkpoint, theirs, found.transposed, sources.get(found.ours))
            wrong.extend([f"{theirs} {doubt}"] if doubt else [])
            sources[found.ours] = (theirs, found.transposed)
        elif found is None or not (found.ours is None or _is_tied_head(model, found.ours)):
            extra.append(theirs)
    twin = tied_twin(model, checkpoint, names)
    if twin is not None and EMBEDDING not in sources:
        doubt = _doubt(wanted[EMBEDDING], checkpoint, twin, False, None)
        wrong.extend([f"{twin} {doubt}"] if doubt else [])
        sources[EMBEDDING] = (twin, False)
    missing = {ours: names.theirs(ours)[1] for ours in wanted if ours not in sources}
    if model.task != CAUSAL:
        missing, extra = _without_heads(model, checkpoint.folder, missing, extra, sources, names)
    if missing or wrong:
        problems = {"missing": list(missing.values()), "unexpected": extra, "of another shape or type": wrong}
        raise _refusal(checkpoint.folder, problems, model)
    if extra:
        _tell(model)("%s: %d tensors are not used: %s%s", checkpoint.folder, len(extra), listed(extra), _advice(model))
    return sources


def tied_twin(model: Decoder, checkpoint: Checkpoint, names: NameMap) -> str | None:
    """The name under which a tied model's one matrix is stored as the head's, if it is."""
    if not model.config.tie:
        return None
    found = ((theirs, names.find(theirs)) for theirs in checkpoint.shapes)
    return next((theirs for theirs, line in found if line is not None and line.ours == HEAD_WEIGHT), None)


def warn_of_different_twins(model: Decoder, checkpoint: Checkpoint, names: NameMap, sources: Sources) -> None:
    """A line where a model that is said to be tied has two matrices; the embedding's serves for both then."""
    twin, embedding = tied_twin(model, checkpoint, names), sources.get(EMBEDDING, ("", False))[0]
    if model.group.rank != 0 or twin is None or twin == embedding or same_values(checkpoint, embedding, twin):
        return
    log.warning(
        "%s: %s and %s differ although its config.json ties them: the first is used for both, as by transformers 4; "
        "with tie_word_embeddings false in config.json each is used for itself", checkpoint.folder, embedding, twin,
    )  # fmt: skip


def same_values(checkpoint: Checkpoint, first: str, second: str) -> bool:
    """Whether two matrices are equal, a few rows at a time."""
    shape = checkpoint.shapes[first]
    if checkpoint.shapes[second] != shape or not checkpoint.is_floating(second):
        return False
    pieces = [(slice(i, min(i + ROWS, shape[0])), slice(0, shape[1])) for i in range(0, shape[0], ROWS)]
    return all(torch.equal(checkpoint.read(first, piece), checkpoint.read(second, piece)) for piece in pieces)


def stored_dtype(config: DecoderConfig, checkpoint: Checkpoint, names: NameMap) -> torch.dtype:
    """The type of the weights, buffers aside. Where they are of several, what config.json says if any is of that, else
    the type of most bytes.
    """
    nbytes: Counter[torch.dtype] = Counter()
    for theirs, shape in checkpoint.shapes.items():
        found, dtype = names.find(theirs), checkpoint.dtype_of(theirs)
        if found is not None and found.ours is not None and dtype is not None:
            nbytes[dtype] += dtype.itemsize * torch.Size(shape).numel()
    if not nbytes:
        return torch.float32
    said = getattr(torch, str(config.hf.get("dtype") or config.hf.get("torch_dtype")).removeprefix("torch."), None)
    chosen = next((dtype for dtype in nbytes if dtype == said), nbytes.most_common(1)[0][0])
    if len(nbytes) > 1:
        shares = ", ".join(f"{count / 1e6:.1f} MB of {shown(dtype)}" for dtype, count in nbytes.most_common())
        log.info("%s: weights of several types (%s); read as %s", checkpoint.folder, shares, shown(chosen))
    return chosen


def shown(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def listed(names: Iterable[str]) -> str:
    """Names in order, so many of them."""
    every = sorted(name if name.isprintable() else ascii(name) for name in names)  # a file's names may hold anything
    more = len(every) - SHOWN
    return ", ".join(every[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _tell(model: Decoder) -> Callable[..., None]:
    return log.warning if model.group.rank == 0 else log.debug


def _without_heads(
    model: Decoder,
    folder: Path,
    missing: dict[str, str],
    extra: list[str],
    sources: Sources,
    names: NameMap,
) -> tuple[dict[str, str], list[str]]:
    """What is wrong besides the heads: a head that is missing whole will be made, another task's is left out."""
    tell = _tell(model)
    made = [theirs for ours, theirs in missing.items() if ours.startswith(TASK_HEAD)]
    if made and not any(ours.startswith(TASK_HEAD) for ours in sources):
        tell("%s holds no head for %s: %s made anew, train before use", folder, model.task, ", ".join(made))
        missing = {ours: theirs for ours, theirs in missing.items() if not ours.startswith(TASK_HEAD)}
    heads = [theirs for theirs in extra if (found := names.find(theirs)) and is_head(found.ours or "")]
    if heads:
        tell("%s: %s not needed for %s and left out", folder, ", ".join(heads), model.task)
    return missing, [theirs for theirs in extra if theirs not in heads]


def is_head(ours: str) -> bool:
    return ours == HEAD_WEIGHT or ours.startswith(TASK_HEAD)


def _doubt(
    parameter: nn.Parameter, checkpoint: Checkpoint, theirs: str, transposed: bool, earlier: tuple[str, bool] | None
) -> str | None:
    """Why a stored tensor cannot be the parameter's, if it cannot."""
    shape = full_shape_of(parameter)[::-1] if transposed else full_shape_of(parameter)
    where = f" (in {checkpoint.file_of(theirs)})"
    if not checkpoint.is_floating(theirs):
        return f"of {checkpoint.type_name(theirs)} instead of float32, bfloat16, float16 or float64{where}"
    if checkpoint.shapes[theirs] != shape:
        return f"{list(checkpoint.shapes[theirs])} instead of {list(shape)}{where}"
    return f"is the same tensor as {earlier[0]}{where}" if earlier else None


def _is_tied_head(model: Decoder, ours: str) -> bool:
    """Old checkpoints hold a copy of the embedding under the head's name; tied models do not read it."""
    return model.config.tie and ours == HEAD_WEIGHT


def _refusal(folder: Path, problems: Mapping[str, list[str]], model: Decoder) -> CheckpointError:
    found = [f"{len(names)} {kind}: {listed(names)}" for kind, names in problems.items() if names]
    return CheckpointError(
        f"the tensors in {folder} are not those that its config.json describes; {'; '.join(found)}{_advice(model)}"
    )


def _advice(model: Decoder) -> str:
    """What to try where a checkpoint was made for another task."""
    made_for = task_of(model.config.hf) if model.task == CAUSAL else model.task
    return f"; it was made for another task: load it with task={made_for!r}" if made_for != model.task else ""
