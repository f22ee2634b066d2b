"""A family is one file and one line of the registry: no other module names one, and one that was made up for these
tests (seventh_family.py) does all that the others do once it is registered.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from cluster.engine.engine import generate
from cluster.engine.engine_builder import build_engine, build_runner
from cluster.engine.engine_config import EngineConfig
from cluster.engine.request import Request, SamplingParams, StoppingCriteria
from cluster.training.step.trainer import Trainer, TrainerConfig
from launch.main import main
from parallel.attention.forward_pass import Pass
from parallel.errors import ConfigError
from parallel.ranks.group import Group
from parallel.ranks.mesh import Groups
from tests.cluster.training.step.steps import NORMALISER, batch_of, documents
from tests.tp_decoders.seventh_family import FAMILY
from tp_decoders import build, initialise, load, save
from tp_decoders.adapters.lora import attach
from tp_decoders.model.adapted_layers import adapted
from tp_decoders.model.decoder import Decoder
from tp_decoders.model.lora_config import LoraConfig
from tp_decoders.model.pruning import prune_heads
from tp_decoders.padded import PaddedModel
from tp_decoders.registry import FAMILIES, config_from_hf

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("parallel", "tp_decoders", "cluster", "launch")
OWN = re.compile(r"tp_decoders/(families/.*|registry)\.py")
NAMED = {
    "tp_decoders/convert/neox_settings.py": "reads the settings of GPT-NeoX's own code, a format of one family",
    "tp_decoders/convert/gpt2_tensorflow.py": "reads OpenAI's files, which are GPT-2's only",
    "tp_decoders/text/tokenizer_settings.py": "tells transformers' classes of tokenizers apart; whose, it asks",
}
"""Modules that may write a family's name, and why."""
HF = {
    "architectures": ["SeventhForCausalLM"], "vocab_size": 97, "hidden_size": 24.0, "num_hidden_layers": 2,
    "num_attention_heads": 4, "intermediate_size": 52, "max_position_embeddings": 32,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- names


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Of the product, by path, those that are no family's own."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if not OWN.fullmatch(name) and not name.endswith("_pb2.py"):
                yield name, ast.parse(path.read_text(encoding="utf-8"))


def strings(tree: ast.Module) -> Iterator[str]:
    """The words of all literals that are part of an expression: docstrings are not."""
    free = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in free:
            yield from node.value.split()


def test_no_module_outside_the_families_names_one() -> None:
    types = {name: begins for family in FAMILIES.values() for name, begins in family.types.items()}
    one = re.compile(f"({'|'.join(types)})|({'|'.join(types.values())})([A-Z]\\w*)?")
    found = {name: [word for word in strings(tree) if one.fullmatch(word)] for name, tree in modules()}
    assert {name: words for name, words in found.items() if words and name not in NAMED} == {}
    assert all(found[name] for name in NAMED), "a reason that is not needed any more"


def test_families_are_imported_by_the_registry_alone() -> None:
    for name, tree in modules():
        for node in ast.walk(tree):
            imported = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if imported.startswith("tp_decoders.families"):
                assert imported == "tp_decoders.families.family", f"{name} imports {imported}"


# ------------------------------------------------------------------------------------------------------- the seventh


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A checkpoint of the seventh family, which is registered as long as the test lasts."""
    monkeypatch.setitem(FAMILIES, "seventh", FAMILY)
    save(initialise(build(config_from_hf(HF)), seed=3), tmp_path / "seventh")
    return tmp_path / "seventh"


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def logits_of(model: Decoder, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.head.gather(model(tokens, Pass.packed([len(tokens)])))


def by_formula(folder: Path, tokens: Tensor) -> Tensor:
    """The family's logits, in plain torch."""
    weights = {name.removeprefix("seventh."): tensor for name, tensor in tensors(folder).items()}
    x = weights["tokens.weight"][tokens]

    def norm(name: str, x: Tensor) -> Tensor:
        return functional.rms_norm(x, (24,), weights[f"{name}.weight"], 1e-6)

    x = x + weights["places.weight"][: len(tokens)]
    for layer in ("layers.0", "layers.1"):
        qkv = norm(f"{layer}.norm1", x) @ weights[f"{layer}.attention.qkv.weight"].t()
        q, k, v = qkv.view(len(tokens), 3, 4, 6).permute(1, 2, 0, 3)
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1)
        x = x + seen @ weights[f"{layer}.attention.o.weight"].t()
        y = norm(f"{layer}.norm2", x)
        inner = functional.silu(y @ weights[f"{layer}.gate.weight"].t()) * (y @ weights[f"{layer}.up.weight"].t())
        x = x + inner @ weights[f"{layer}.down.weight"].t()
    return norm("norm", x) @ weights["tokens.weight"].t()


def test_it_computes_its_formula(folder: Path) -> None:
    tokens = torch.tensor([5, 90, 0, 17, 33, 2, 2])
    torch.testing.assert_close(logits_of(load(folder), tokens), by_formula(folder, tokens), rtol=1e-4, atol=1e-5)


def test_it_is_saved_and_loaded_bit_for_bit_and_its_type_told_by_its_class(folder: Path, tmp_path: Path) -> None:
    save(load(folder), tmp_path / "again")
    first, again = tensors(folder), tensors(tmp_path / "again")
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    written = json.loads((tmp_path / "again/config.json").read_text())
    assert written["model_type"] == "seventh" and isinstance(written["hidden_size"], int)


def registered(group: Group, folder: str, tokens: Tensor) -> Tensor:
    FAMILIES["seventh"] = FAMILY
    try:
        return logits_of(load(folder, group=group), tokens)
    finally:
        del FAMILIES["seventh"]


def test_its_bits_do_not_depend_on_the_ranks(folder: Path, ranks: Callable[..., list[Any]]) -> None:
    tokens = torch.tensor([5, 90, 0, 17, 33, 2, 2])
    for divided in ranks(3, registered, str(folder), tokens):
        assert torch.equal(divided, logits_of(load(folder), tokens))


def test_it_is_converted(folder: Path, tmp_path: Path) -> None:
    assert main(["convert", str(folder), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    first, half = tensors(folder), tensors(tmp_path / "half")
    assert first.keys() == half.keys() and all(torch.equal(first[name].bfloat16(), half[name]) for name in first)


def test_it_generates_greedily(folder: Path) -> None:
    model, prompt, config = load(folder), (5, 90, 0, 17), EngineConfig(kv_blocks=8, max_sequences=2, max_step_tokens=16)
    request = Request(
        request_id="one",
        token_ids=prompt,
        sampling=SamplingParams(temperature=0.0),
        stopping=StoppingCriteria(max_new_tokens=6, ignore_eos=True),
    )
    ((result,),) = generate(build_engine(build_runner(model, config, 0), config), [request])
    tokens = list(prompt)
    for _ in range(6):
        tokens.append(int(logits_of(model, torch.tensor(tokens))[-1].argmax()))
    assert list(result.token_ids) == tokens[len(prompt) :]


def test_it_learns_a_step_whole_and_by_an_adapter(folder: Path) -> None:
    for adapts in (False, True):
        model = load(folder)
        if adapts:
            attach(model, LoraConfig(rank=2), seed=1)
            assert [name for name, _, _ in adapted(model)] == ["blocks.0.qkv", "blocks.1.qkv"]
        trainer = Trainer(model, Groups(Group.single(), Group.single()), TrainerConfig())
        before = trainer.forward_backward(batch_of(documents(0), NORMALISER)).loss
        trainer.optim_step(learning_rate=1e-2)
        after = trainer.forward_backward(batch_of(documents(0), NORMALISER)).loss
        assert after < before


def test_it_is_called_as_transformers_models_are(folder: Path) -> None:
    model, tokens = load(folder), torch.tensor([5, 90, 0, 17])
    torch.testing.assert_close(PaddedModel(model)(tokens[None]).logits[0], logits_of(model, tokens))


def test_it_classifies_and_refuses_what_is_another_familys(folder: Path, tmp_path: Path) -> None:
    save(load(folder, "sequence-classification", labels=3), tmp_path / "classifier")
    written = json.loads((tmp_path / "classifier/config.json").read_text())
    assert written["architectures"] == ["SeventhForSequenceClassification"]
    assert load(tmp_path / "classifier", "sequence-classification").task_head is not None
    with pytest.raises(ConfigError, match="of a seventh is not supported, only of gpt2; choose one of causal-lm, "):
        load(folder, "double-heads")
    with pytest.raises(ConfigError, match="heads of a model of type seventh cannot be pruned"):
        prune_heads(load(folder), {0: [1]})
