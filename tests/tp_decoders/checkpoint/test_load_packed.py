"""A model that was loaded for serving holds each matrix once, answers with the same bits and gives every value back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tests.cluster.engine.tiny_models as tiny
from cluster.training.step.optimizer import OptimizerConfig, ShardedAdamW
from parallel.attention.forward_pass import Pass
from parallel.errors import ConfigError, WeightReleased
from parallel.matmul.products import native_products
from parallel.ranks.gather_parameter import whole_tensor
from parallel.ranks.group import Group
from parallel.sharding.released_weight import is_released, values
from tp_decoders import load, save
from tp_decoders.adapters.lora import attach, merge
from tp_decoders.adapters.peft_files import load_merged, save_adapter
from tp_decoders.checkpoint.load_save import fill, open_checkpoint
from tp_decoders.model.adapted_layers import linears
from tp_decoders.model.lora_config import LoraConfig
from tp_decoders.model.pruning import prune_heads
from tp_decoders.registry import family_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
    pytest.mark.skipif(not native_products(), reason="weights are packed for the native kernels"),
]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in tiny.CONFIGS},
    "gpt2 tied": ("gpt2", {"tie_word_embeddings": True}),
    "mpt tied": ("mpt", {"tie_word_embeddings": True}),
}
LENGTHS = (9, 4)
TOKENS = torch.randint(tiny.VOCAB, (sum(LENGTHS),), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("packed")
    return {
        name: str(tiny.save_tiny(family, root / name.replace(" ", "_"), **more))
        for name, (family, more) in MODELS.items()
    }


def logits_of(model: Any) -> Tensor:
    with torch.inference_mode():
        return model.head.gather(model(TOKENS, Pass.packed(LENGTHS))).clone()  # type: ignore[no-any-return]


def differences(group: Group, folders: dict[str, str], dtype: torch.dtype, root: str) -> list[str]:
    """What a model that was loaded packed has or answers otherwise than a plain one, on this rank."""
    found = []
    for name, folder in folders.items():
        plain, packed = (load(folder, group=group, dtype=dtype, packed=one) for one in (False, True))
        left = [
            weight for layer in linears(packed).values() if (weight := layer.weight).numel() and not is_released(weight)
        ]
        resident = sum(p.untyped_storage().nbytes() for p in packed.parameters() if is_released(p))
        found += [f"{name}: {len(left)} matrices plain"] if left or resident > 200 else []
        found += [] if torch.equal(logits_of(plain), logits_of(packed)) else [f"{name}: other logits"]
        own = dict(plain.named_parameters())
        found += [f"{name}: {n}" for n, p in packed.named_parameters() if not torch.equal(values(p), own[n])]
        target = f"{root}/{name.replace(' ', '_')}_{group.size}_{dtype}"
        save(packed, target)
        again = dict(load(target, group=group).named_parameters())
        found += [f"{name}: {n} saved" for n, p in own.items() if not torch.equal(p, again[n])]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_answers_values_and_saved_files_are_those_of_a_plain_model(
    folders: dict[str, str], size: int, dtype: torch.dtype, tmp_path: Path, ranks: Callable[..., list[Any]]
) -> None:
    found = (
        ranks(size, differences, folders, dtype, str(tmp_path))
        if size > 1
        else [differences(Group.single(), folders, dtype, str(tmp_path))]
    )
    assert found == [[]] * size


def test_an_adapter_merged_into_a_packed_model_and_pruned_heads_are_those_of_a_plain_one(
    folders: dict[str, str], tmp_path: Path
) -> None:
    folder = folders["gpt2 tied"]
    trained = load(folder)
    attach(trained, LoraConfig(rank=2))
    for name, p in trained.named_parameters():
        if ".adapter." in name:
            torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(1))
    save_adapter(trained, tmp_path / "adapter")
    found = []
    for packed in (False, True):
        model = load(folder, packed=packed)
        load_merged(model, tmp_path / "adapter")
        merged = logits_of(model)
        prune_heads(model, {0: [1, 4], 1: [0]})
        found.append([merged, logits_of(model), *(whole_tensor(p, model.group) for _, p in model.named_parameters())])
    assert not torch.equal(found[0][0], logits_of(load(folder)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["gpt2 tied", "gpt_neox"])
def test_other_weights_read_into_a_packed_model_change_its_answers(
    folders: dict[str, str], name: str, tmp_path: Path
) -> None:
    model, other = load(folders[name], packed=True), load(folders[name])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    save(other, tmp_path / "other")
    before = logits_of(model)
    names = family_of(model.config.model_type).names
    with open_checkpoint(tmp_path / "other") as checkpoint:
        for ours, parameter in model.named_parameters():
            line, theirs = names.theirs(ours)
            fill(parameter, checkpoint, theirs, line.transposed, 0)
    assert torch.equal(logits_of(model), logits_of(other)) and not torch.equal(before, logits_of(other))


def test_a_packed_model_is_not_trained(folders: dict[str, str]) -> None:
    model = load(folders["gpt_neox"], packed=True)
    with pytest.raises(ConfigError, match="packed=False"):
        ShardedAdamW(model, Group.single(), Group.single(), OptimizerConfig())
    attach(model, LoraConfig(rank=2))
    with pytest.raises(WeightReleased, match="packed=False"):
        model(TOKENS, Pass.packed(LENGTHS)).sum().backward()
    merge(model)
    assert all(not p.requires_grad for p in model.parameters() if is_released(p))
