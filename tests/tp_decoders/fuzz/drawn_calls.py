"""Padded calls drawn at random for a drawn model: which inputs are given, where padding is, what is asked for, how
often the call is cut at its cache, for which task; or what is wrong with it. A call is a function of its seed alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.tp_decoders.fuzz.drawn import CLASSES, Case, draw
from tests.tp_decoders.padded.padded_cases import Scenario, without_firsts
from tp_decoders.model.task_config import SEQUENCES, SPANS, TOKENS
from tp_decoders.registry import family_of

CAUSAL = "causal-lm"
ENDINGS = {
    CAUSAL: "LMHeadModel", SEQUENCES: "ForSequenceClassification", TOKENS: "ForTokenClassification",
    SPANS: "ForQuestionAnswering",
}  # fmt: skip
TYPED = ("gpt2", "gpt_bigcode")
FLAGS = ("output_attentions", "output_hidden_states", "use_cache")
WRONG = {
    "both inputs": "both input_ids and inputs_embeds",
    "neither input": "neither input_ids nor inputs_embeds",
    "a mask of other numbers": "other numbers than 0",
    "a mask of another size": "attention_mask of shape",
    "a head mask of another size": "head_mask of shape",
    "labels of another size": "labels of shape",
    "ids beyond the vocabulary": "the vocabulary is 0 to",
    "an encoder": "without cross-attention",
    "token types": "no token types",
    "positions": "a model with ALiBi",
    "a past of no layers": "past_key_values of 0 layers",
}
"""What is wrong with a call, and words of the refusal."""


@dataclass(frozen=True)
class DrawnCall:
    """What one seed stands for."""

    model: Case
    batch: int
    time: int
    side: str  # of the padding: none, right, left, gaps
    cuts: tuple[int, ...]  # columns at which the call is divided, each part handed the past of the one before
    inputs: tuple[str, ...]  # those of them that are given besides ids, mask and labels
    flags: tuple[tuple[str, bool], ...]
    task: str
    pruned: tuple[tuple[int, tuple[int, ...]], ...]
    wrong: str | None

    def __str__(self) -> str:
        asked = ", ".join(f"{name} = {value}" for name, value in self.flags)
        return (
            f"{self.model}\n    padded call: {self.batch} x {self.time} padded {self.side}, cut at {self.cuts}, with "
            f"{self.inputs}, {asked}, task {self.task}, pruned {self.pruned}, wrong: {self.wrong}"
        )

    @property
    def family(self) -> str:
        return self.model.family

    @property
    def crossing(self) -> bool:
        return any(name.startswith("encoder") for name in self.inputs)


def draw_call(seed: int) -> DrawnCall:
    rng, model = random.Random(f"call {seed}"), _for_transformers(draw(seed))
    reach, time = _reach(model), 0
    time = rng.randint(2, min(reach, 9))
    task = rng.choice([CAUSAL] * 4 + [SEQUENCES, TOKENS, SPANS])
    if getattr(transformers, class_name(model.family, task), None) is None or (
        task == SPANS and task not in family_of(model.family).tasks  # refused
    ):
        task = CAUSAL
    inputs = _drawn_inputs(rng, model, task)
    cuts = tuple(sorted({rng.randint(1, time - 1) for _ in range(rng.choice([0, 0, 1, 2]))})) if task == CAUSAL else ()
    cuts = tuple(cut for cut in cuts if cut <= time - 2)
    flags = tuple((flag, rng.random() < 0.5) for flag in FLAGS if rng.random() < 0.7)
    if task in (TOKENS, SPANS):  # the reference's take no use_cache
        flags = tuple(pair for pair in flags if pair[0] != "use_cache")
    pruned = _drawn_pruned(rng, model) if model.family == "gpt2" and rng.random() < 0.3 else ()
    if pruned and any(name.startswith("encoder") for name in inputs):  # the reference has no head mask for both
        inputs = tuple(name for name in inputs if not name.startswith("head_mask"))
    wrong = rng.choice(_mistakes(model, task)) if rng.random() < 0.15 else None
    side = rng.choice(["none", "right", "left", "gaps"]) if task != SPANS else "none"
    return DrawnCall(model, rng.randint(1, 4), time, side, cuts, inputs, flags, task, pruned, wrong)


def _for_transformers(model: Case) -> Case:
    """The tests' own MPT has no padded call; transformers' plain one stands for it. Choices of types are not drawn."""
    plain = ("d_model", "n_heads", "n_layers", "vocab_size", "max_seq_len")
    config = {k: v for k, v in model.config.items() if k in plain} if model.dense else dict(model.config)
    config["vocab_size"] = max(config["vocab_size"], 3)
    return replace(model, config=config, dense=False)


def _size(model: Case, *names: str) -> int:
    return int(next(model.config[name] for name in names if name in model.config))


def _reach(model: Case) -> int:
    return _size(model, "n_positions", "max_position_embeddings", "max_seq_len")


def heads_of(model: Case) -> int:
    return _size(model, "n_head", "num_attention_heads", "n_heads")


def layers_of(model: Case) -> int:
    return _size(model, "n_layer", "num_hidden_layers", "n_layers")


def width_of(model: Case) -> int:
    return _size(model, "n_embd", "hidden_size", "d_model")


def class_name(family: str, task: str) -> str:
    ending = "ForCausalLM" if task == CAUSAL and family not in ("gpt2", "gpt_bigcode") else ENDINGS[task]
    ending = "ForCausalLM" if family == "gpt_bigcode" and task == CAUSAL else ending
    return CLASSES.get(family, "Mpt") + ending


def _drawn_inputs(rng: random.Random, model: Case, task: str) -> tuple[str, ...]:
    found = []
    if model.family != "mpt" and rng.random() < 0.4:
        found.append(rng.choice(["position_ids", "one row of position_ids"]))
    if model.family in TYPED and rng.random() < 0.4:
        found.append("token_type_ids")
    if rng.random() < 0.3:
        found.append(rng.choice(["head_mask", "head_mask by layer"]))
    if rng.random() < 0.3 and task != SEQUENCES:
        found.append("inputs_embeds")
    crosses = model.family == "gpt2" or (model.family == "gpt_bigcode" and not model.config.get("multi_query", True))
    if crosses and task == CAUSAL and rng.random() < 0.4:
        found.append(rng.choice(["encoder", "encoder with a mask", "encoder with a mask by token"]))
    return tuple(found)


def _drawn_pruned(rng: random.Random, model: Case) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """At least one head stays in every layer, as the reference needs it."""
    heads, found = heads_of(model), []
    for layer in range(layers_of(model)):
        gone = rng.sample(range(heads), rng.randint(0, heads - 1))
        if gone:
            found.append((layer, tuple(sorted(gone))))
    return tuple(found)


def _mistakes(model: Case, task: str) -> list[str]:
    fits = [name for name in WRONG if name not in ("token types", "positions")]
    fits += ["token types"] if model.family not in TYPED else []
    fits += ["positions"] if model.family == "mpt" else []
    return [name for name in fits if task == CAUSAL or name != "labels of another size"]


# --------------------------------------------------------------------------------------------------------- the calls


class Drawer:
    """Makes the tensors of a call, one after the other, from its seed."""

    def __init__(self, drawn: DrawnCall) -> None:
        self.drawn, self.shape = drawn, (drawn.batch, drawn.time)
        self.from_seed = torch.Generator().manual_seed(drawn.model.seed + 77)
        self.vocab = drawn.model.config["vocab_size"]

    def ids(self, below: int, *shape: int, least: int = 0) -> Tensor:
        return torch.randint(least, below, shape or self.shape, generator=self.from_seed)

    def mask(self) -> Tensor:
        """At least one token in every row; two beside each other in the first, behind the last cut."""
        batch, time = self.shape
        mask = torch.ones(self.shape, dtype=torch.long)
        for row in range(1, batch):
            count = int(self.ids(time, 1))
            if self.drawn.side == "right":
                mask[row, time - count :] = 0
            elif self.drawn.side == "left":
                mask[row, :count] = 0
            elif self.drawn.side == "gaps":
                mask[row, self.ids(time, count)] = 0
        mask[:, -1] |= mask.sum(1) == 0
        return mask

    def labels(self, ids: Tensor, mask: Tensor) -> Tensor:
        labels = ids.masked_fill((mask == 0) | (self.ids(4) == 0), -100)
        labels[0, -1] = ids[0, -1]
        return labels


def our_positions(mask: Tensor) -> Tensor:
    """Columns counted from a row's first token."""
    return (torch.arange(mask.shape[1]) - mask.argmax(1, keepdim=True)).clamp(0)


def scenario_of(drawn: DrawnCall) -> Scenario:
    """The calls that are ours and theirs, cut where drawn so."""
    drawer, given = Drawer(drawn), drawn.inputs
    ids, mask = drawer.ids(drawer.vocab, least=1), drawer.mask()
    ids = ids * mask  # the reference finds a sequence's end by its padding token
    ours: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, **dict(drawn.flags)}
    theirs_labels = _label(drawn, drawer, ours)
    _steer(drawn, drawer, ours)
    theirs = {**ours, **theirs_labels}
    masks = None if drawn.crossing else _head_masks(drawn, theirs.pop("head_mask", None))
    if drawn.family != "mpt" and "position_ids" not in theirs:
        theirs["position_ids"] = our_positions(mask)
    if drawn.side == "none" and drawn.model.seed % 2:
        del ours["attention_mask"]
        if "position_ids" not in ours:  # the reference would take some for packed sequences (see padded_model.py)
            del theirs["attention_mask"]
    grad_of: tuple[str, ...] = ("inputs_embeds",) if "inputs_embeds" in given else ()
    if drawn.crossing and not drawn.cuts:
        grad_of = (*grad_of, "encoder_hidden_states")
    stops = (*drawn.cuts, drawn.time)
    return Scenario(_parts(ours, stops), _parts(theirs, stops), masks, grad_of)


def _label(drawn: DrawnCall, drawer: Drawer, ours: dict[str, Any]) -> dict[str, Any]:
    """Adds our labels; the reference's, where they differ."""
    ids, mask = ours["input_ids"], ours["attention_mask"]
    if drawn.task == CAUSAL:
        ours["labels"] = drawer.labels(ids, mask)
        return {"labels": without_firsts(ours["labels"], mask)}
    if drawn.task == SEQUENCES:
        ours["labels"] = drawer.ids(3, drawn.batch)
    elif drawn.task == TOKENS:
        ours["labels"] = drawer.ids(3).masked_fill(mask == 0, -100)
    else:
        ours["start_positions"], ours["end_positions"] = (drawer.ids(drawn.time, drawn.batch) for _ in range(2))
    return {}


def _steer(drawn: DrawnCall, drawer: Drawer, ours: dict[str, Any]) -> None:
    """Adds what is given besides."""
    for name in drawn.inputs:
        if name == "position_ids":
            ours["position_ids"] = drawer.ids(_reach(drawn.model))
        elif name == "one row of position_ids":
            ours["position_ids"] = drawer.ids(_reach(drawn.model), 1, drawn.time)
        elif name == "token_type_ids":
            ours["token_type_ids"] = drawer.ids(drawer.vocab)
        elif name == "inputs_embeds":
            del ours["input_ids"]
            ours["inputs_embeds"] = torch.randn(*drawer.shape, width_of(drawn.model), generator=drawer.from_seed)
        elif name.startswith("head_mask"):
            heads, layers = heads_of(drawn.model), layers_of(drawn.model)
            shape = (layers, heads) if "layer" in name else (heads,)
            ours["head_mask"] = drawer.ids(4, *shape) / 2
        elif name.startswith("encoder"):
            _encode(drawn, drawer, ours, name)


def _encode(drawn: DrawnCall, drawer: Drawer, ours: dict[str, Any], name: str) -> None:
    states = int(drawer.ids(5, 1)) + 1
    ours["encoder_hidden_states"] = torch.randn(drawn.batch, states, width_of(drawn.model), generator=drawer.from_seed)
    if "mask" in name:
        shape = (drawn.batch, drawn.time, states) if "token" in name else (drawn.batch, states)
        seen = drawer.ids(2, *shape)
        seen[..., 0] = 1
        ours["encoder_attention_mask"] = seen


def _head_masks(drawn: DrawnCall, mask: Tensor | None) -> list[Tensor] | None:
    """By layer, of the heads that are left."""
    if mask is None:
        return None
    gone, heads = dict(drawn.pruned), heads_of(drawn.model)
    rows = mask.expand(layers_of(drawn.model), heads)
    left = ([i for i in range(heads) if i not in gone.get(layer, ())] for layer in range(len(rows)))
    return [row[kept] for row, kept in zip(rows, left, strict=True)]


def _parts(whole: dict[str, Any], stops: tuple[int, ...]) -> list[dict[str, Any]]:
    if len(stops) == 1:
        return [whole]
    calls, start = [], 0
    for stop in stops:
        one = {**whole, "use_cache": True}
        for name in ("input_ids", "inputs_embeds", "labels", "position_ids", "token_type_ids"):
            if name in whole:
                one[name] = whole[name][:, start:stop]
        if "attention_mask" in whole:
            one["attention_mask"] = whole["attention_mask"][:, :stop]
        if (states := whole.get("encoder_attention_mask")) is not None and states.dim() == 3:
            one["encoder_attention_mask"] = states[:, start:stop]
        if stop != stops[-1]:
            one.pop("labels", None)
        calls.append(one)
        start = stop
    return calls


def spoil(drawn: DrawnCall, call: dict[str, Any]) -> dict[str, Any]:
    """The call with its mistake."""
    batch, time, width = drawn.batch, drawn.time, width_of(drawn.model)
    ones = torch.ones(batch, time, dtype=torch.long)
    plain = {"input_ids": ones, "labels": call["labels"]} if "labels" in call else {"input_ids": ones}
    changes: dict[str, dict[str, Any]] = {
        "both inputs": {"inputs_embeds": torch.zeros(batch, time, width)},
        "neither input": {"input_ids": None},
        "a mask of other numbers": {"attention_mask": ones * 0.5},
        "a mask of another size": {"attention_mask": torch.ones(batch, time + 1)},
        "a head mask of another size": {"head_mask": torch.ones(heads_of(drawn.model) + 1)},
        "labels of another size": {"labels": ones[:, 1:]},
        "ids beyond the vocabulary": {"input_ids": ones + drawn.model.config["vocab_size"]},
        "an encoder": {"encoder_hidden_states": torch.zeros(batch, 2, width)},
        "token types": {"token_type_ids": ones},
        "positions": {"position_ids": ones},
        "a past of no layers": {"past_key_values": ()},
    }
    assert drawn.wrong is not None, "only a wrong call is spoilt"
    return plain | changes[drawn.wrong]
