"""Tokenizer folders as people have them, and texts to try them with: everything drawn from seeds, the same under any
version of transformers. Knows the files only; who reads them is reference_tokenizers.py's and the tests' business.

A folder is a vocabulary (the first merges of a real one, or all of it) and one choice from each row of `CHOICES`.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[2] / "data/tokenizers"
END = "<|endoftext|>"
FEW_MERGES = 400
TEXTS = 200
PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
FIM = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<filename>", "<gh_stars>", "<issue_start>")
NAMED = {"bos_token": END, "eos_token": END, "unk_token": END}

KINDS = {
    "gpt2": ("gpt2", "gpt2"),
    "gpt2-bpe": ("gpt2", "gpt2"),
    "neox": ("gpt-neox-20b", "gpt_neox"),
    "mpt": ("gpt-neox-20b", "mpt"),
    "bigcode": ("gpt2", "gpt_bigcode"),
}
"""Kind: its vocabulary's folder, and the model_type of its config.json."""

CHOICES: dict[str, tuple[Any, ...]] = {
    "class": (None, "ownFast", "PreTrainedTokenizerFast"),
    "add_bos_token": (None, True),
    "add_eos_token": (None, True),
    "add_prefix_space": (None, True, False),
    "named": ("absent", "text", "object", "map", "map-object", "other"),
    "added": ("absent", "decoder", "decoder-flags", "added_tokens.json", "additional"),
    "split_special_tokens": (None, True),
    "template": (False, True),
}


def combinations(kind: str) -> Iterator[dict[str, Any]]:
    """Every combination that the kind can have."""
    for values in itertools.product(*CHOICES.values()):
        choice = dict(zip(CHOICES, values, strict=True))
        if kind == "gpt2-bpe" and (choice["template"] or choice["class"] == "PreTrainedTokenizerFast"):
            continue  # its files hold no template, and that class reads tokenizer.json only
        if choice["split_special_tokens"] and (choice["add_bos_token"] or choice["add_eos_token"]):
            continue  # these have nothing to do with each other
        yield choice


def drawn(kind: str, seed: int, count: int) -> list[dict[str, Any]]:
    """Some of the combinations."""
    return random.Random(f"{kind} {seed}").sample(list(combinations(kind)), count)


# --------------------------------------------------------------------------------------------------------------- files


def write_folder(folder: Path, kind: str, choice: dict[str, Any], merges: int | None = FEW_MERGES) -> None:
    """The folder of one combination; `merges` None: with the whole vocabulary."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    source, model_type = KINDS[kind]
    pipeline = json.loads(_pipeline(source, merges))
    if kind == "bigcode":
        pipeline["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, pipeline["pre_tokenizer"]],
        }
        _append(pipeline, FIM)
    if choice["template"]:
        pipeline["post_processor"] = _template(pipeline)
    _write(folder, "config.json", {"model_type": model_type})
    size = _size(pipeline)
    config, special_map = _config(kind, choice, size, pipeline)
    if kind == "gpt2-bpe":
        _write(folder, "vocab.json", pipeline["model"]["vocab"])
        lines = "\n".join(m if isinstance(m, str) else " ".join(m) for m in pipeline["model"]["merges"])
        (folder / "merges.txt").write_text(f"#version: 0.2\n{lines}\n", encoding="utf-8")
    else:
        _write(folder, "tokenizer.json", pipeline)
    if choice["added"] == "added_tokens.json":
        _write(folder, "added_tokens.json", {"<|im_start|>": size, "größe": size + 1})
    _write(folder, "tokenizer_config.json", config)
    if special_map:
        _write(folder, "special_tokens_map.json", special_map)


@cache
def _pipeline(source: str, merges: int | None) -> str:
    """A vocabulary's tokenizer.json; cutting a whole one costs more than all that is done with the rest."""
    text = (DATA / source / "tokenizer.json").read_text(encoding="utf-8")
    if merges is None:
        return text
    pipeline = json.loads(text)
    _cut(pipeline, merges)
    return json.dumps(pipeline)


def _write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def _cut(pipeline: dict[str, Any], merges: int) -> None:
    """The bytes and the first merges alone, then the special tokens of the vocabulary's own."""
    model = pipeline["model"]
    alphabet = sorted(token for token in model["vocab"] if len(token) == 1)
    model["merges"] = model["merges"][:merges]
    made = ["".join(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    special = [END, *(["<|padding|>"] if "<|padding|>" in model["vocab"] else [])]
    model["vocab"] = {token: i for i, token in enumerate(dict.fromkeys([*alphabet, *made, *special]))}
    pipeline["added_tokens"] = [{"id": model["vocab"][text], "content": text, **PLAIN} for text in special]


def _size(pipeline: dict[str, Any]) -> int:
    return max([*pipeline["model"]["vocab"].values(), *(t["id"] for t in pipeline["added_tokens"])]) + 1


def _append(pipeline: dict[str, Any], texts: tuple[str, ...]) -> None:
    first = _size(pipeline)
    pipeline["added_tokens"] += [{"id": first + i, "content": text, **PLAIN} for i, text in enumerate(texts)]


def _template(pipeline: dict[str, Any]) -> dict[str, Any]:
    token_id = next(t["id"] for t in pipeline["added_tokens"] if t["content"] == END)
    first, text = {"SpecialToken": {"id": END, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 0}}
    return {
        "type": "TemplateProcessing", "single": [first, text], "pair": [first, text, second],
        "special_tokens": {END: {"id": END, "ids": [token_id], "tokens": [END]}},
    }  # fmt: skip


def _config(
    kind: str, choice: dict[str, Any], size: int, pipeline: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """tokenizer_config.json and special_tokens_map.json."""
    own = "GPTNeoXTokenizer" if KINDS[kind][1] in ("gpt_neox", "mpt") else "GPT2Tokenizer"
    keys = ("add_bos_token", "add_eos_token", "add_prefix_space", "split_special_tokens")
    config = {key: choice[key] for key in keys if choice[key] is not None}
    if choice["class"] is not None:
        config["tokenizer_class"] = choice["class"].replace("own", own)
    special_map: dict[str, Any] = {}
    end = {"content": END, "single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    match choice["named"]:
        case "text":
            config |= NAMED
        case "object":
            config |= {key: {"__type": "AddedToken", **end} for key in NAMED}
        case "map":
            special_map = dict(NAMED)
        case "map-object":
            special_map = {key: dict(end) for key in NAMED} | {
                "pad_token": {**end, "content": "<|pad|>", "lstrip": True}
            }
        case "other":
            config |= {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": END, "pad_token": "<|im_end|>"}
    there = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in pipeline["added_tokens"]}
    match choice["added"]:
        case "decoder":
            plain = ("<|im_start|>", "<|im_end|>", "größe")
            config["added_tokens_decoder"] = there | {
                str(size + i): {"content": text, **PLAIN, "special": "<" in text} for i, text in enumerate(plain)
            }
        case "decoder-flags":
            flags = ({"lstrip": True}, {"rstrip": True}, {"single_word": True, "special": False}, {"normalized": True})
            flagged = zip(("<|im_start|>", "<|im_end|>", "größe", "e\u0301tude"), flags, strict=True)
            config["added_tokens_decoder"] = there | {
                str(size + i): {"content": text, **PLAIN, **flag} for i, (text, flag) in enumerate(flagged)
            }
        case "additional":
            config["additional_special_tokens"] = ["<|im_start|>", "<|im_end|>"]
    return config, special_map


# --------------------------------------------------------------------------------------------------------------- texts

SPECIAL = (END, "<|im_start|>", "<|im_end|>", "größe", "étude", "e\u0301tude", "<s>", "<|pad|>", *FIM)
PIECES = (
    "hello",
    " world",
    "Hello, World!",
    "naïve café",
    "cafe\u0301 re\u0301sume\u0301",
    "ﬁ ﬀ Å Å",
    "ǅ İ ß",
    "吾輩は猫である。",
    "日本語、カタカナ ｶﾀｶﾅ",
    "한국어 가\u1100\u1161",
    "Привет",
    "שלום עולם",
    "مرحبا",
    "😀",
    "👩\u200d👩\u200d👧",
    "🇯🇵🏳️\u200d🌈",
    " ",
    "  ",
    "     ",
    "\t\t",
    "\n",
    "\n\n\n",
    "\r\n",
    "\x00",
    "\x07\x1b[0m",
    "\x7f",
    "\u0085",
    "\u200b",
    "\ufeff",
    "\u2028",
    "\u00a0",
    "\u3000",
    "\ufffd",
    "\U0010ffff",
    "'s",
    "I'll've",
    "1234567890",
    "3.14e-10",
    "٣٤٥",
    "½²",
    "def f(x):\n    return x ** 2\n",
    "if (a && b) { c[0] += 1; }",
    '<div class="x">',
    "http://a.b/c?d=e&f",
    "user@example.org",
    "−—–…",
    "a\u0301\u0302\u0303\u0304",
    "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A",
    "AAAAAAAAAAAAAAAAAAAA",
    "_-_-_-_",
    "e\u0301tudes",
    "größer",
)


def texts(count: int, seed: int = 0) -> list[str]:
    """Unicode of every kind, white space, code, and special tokens inside text; the first ones are edges."""
    edges = ["", " ", "\n", END, END + END, f"{END}hello", f"hello{END}", f" {END} ", "a", "größe", "größer", *PIECES]
    dice = random.Random(seed)
    made = list(edges)
    while len(made) < count:
        parts = [dice.choice(SPECIAL if dice.random() < 0.2 else PIECES) for _ in range(dice.randint(1, 8))]
        made.append(dice.choice(("", " ")).join(parts))
    return made[:count]
