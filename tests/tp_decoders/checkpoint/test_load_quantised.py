"""A model whose matrices are rounded as they are read: the same bits at every tensor-parallel size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tests.cluster.engine.tiny_models as tiny
from parallel.attention.forward_pass import Pass
from parallel.errors import CheckpointError, ConfigError, WeightReleased
from parallel.matmul.packed_store import QuantisedStore
from parallel.matmul.products import native_products
from parallel.options import Scheme
from parallel.quantisation.schemes import quantised
from parallel.ranks.group import Group
from parallel.sharding.released_weight import ReleasedWeight, assign, values
from tp_decoders import load
from tp_decoders.checkpoint.quantised_shards import schemes_of
from tp_decoders.model.adapted_layers import linears
from tp_decoders.model.decoder import Decoder

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
    pytest.mark.skipif(not native_products(), reason="whole numbers are multiplied by the native kernels"),
]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in tiny.CONFIGS},
    "mpt tied": ("mpt", {"tie_word_embeddings": True}),
}
SCHEMES: tuple[Scheme, ...] = ("int8", "int4")
LENGTHS = (9, 4)
TOKENS = torch.randint(tiny.VOCAB, (sum(LENGTHS),), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("quantised")
    return {
        name: str(tiny.save_tiny(family, root / name.replace(" ", "_"), **more))
        for name, (family, more) in MODELS.items()
    }


def logits_of(model: Decoder) -> Tensor:
    with torch.inference_mode():
        return model.head.gather(model(TOKENS, Pass.packed(LENGTHS))).clone()


def answers(group: Group, folders: dict[str, str]) -> dict[str, Tensor]:
    return {
        f"{name} {scheme}": logits_of(load(folder, group=group, quantize=scheme))
        for name, folder in folders.items()
        for scheme in SCHEMES
    }


def test_answers_are_the_same_on_one_two_and_three_ranks(
    folders: dict[str, str], ranks: Callable[..., list[Any]]
) -> None:
    alone = answers(Group.single(), folders)
    for size in (2, 3):
        for found in ranks(size, answers, folders):
            assert [name for name in alone if not torch.equal(found[name], alone[name])] == []


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_they_are_those_of_a_plain_model_that_holds_the_rounded_weights(
    folders: dict[str, str], name: str, scheme: Scheme
) -> None:
    """To what is rounded once more there: an int8 weight times its scale as bfloat16, with int4 the head's alone."""
    model, plain = load(folders[name], quantize=scheme), load(folders[name], dtype=torch.bfloat16)
    exact = load(folders[name], dtype=torch.float32)
    given = schemes_of(plain, scheme)
    assert given.keys() == {id(layer.weight) for layer in linears(plain).values()}
    for layer, other in zip(linears(plain).values(), linears(exact).values(), strict=True):
        with torch.no_grad():
            layer.weight.copy_(quantised(given[id(layer.weight)], other.weight).values())
    near, far = logits_of(plain).double(), logits_of(exact).double()
    got = logits_of(model).double()
    assert ((got - near).norm() / near.norm()).item() < {"int8": 0.03, "int4": 0.01}[scheme]
    assert ((got - far).norm() / far.norm()).item() < {"int8": 0.1, "int4": 0.7}[scheme]


def test_matrices_take_half_and_a_quarter_of_their_bytes(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "vocab_size": 512}
    folder = tiny.save_tiny("gpt_neox", tmp_path, **sizes)
    whole = sum(layer.weight.numel() for layer in linears(load(folder)).values())
    for scheme, most in (("int8", 1.03), ("int4", 0.65)):  # scales are bytes too, and the head is int8
        model = load(folder, quantize=scheme)  # type: ignore[arg-type]
        stores = [layer.weight.store for layer in linears(model).values() if isinstance(layer.weight, ReleasedWeight)]
        assert len(stores) == len(linears(model)) and all(isinstance(store, QuantisedStore) for store in stores)
        assert sum(store.matrix.nbytes for store in stores if isinstance(store, QuantisedStore)) < most * whole


def test_what_quantised_weights_cannot_do_is_said(folders: dict[str, str], tmp_path: Path) -> None:
    model = load(folders["gpt2"], quantize="int8")
    layer = next(iter(linears(model).values()))
    with pytest.raises(WeightReleased, match="for a quantised weight would be rounded once more"):
        assign(layer.weight, values(layer.weight))
    with pytest.raises(ConfigError, match="in bfloat16; leave quantisation out here"):
        load(folders["gpt2"], quantize="int8", dtype=torch.float32)
    with pytest.raises(ConfigError, match="quantize is 'int3'; choose one of"):
        load(folders["gpt2"], quantize="int3")  # type: ignore[arg-type]
    broken = tiny.tiny_model("gpt2")
    broken.transformer.h[0].mlp.c_fc.weight.data[0, 0] = float("nan")
    broken.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="c_fc.weight of .*infinite or NaN"):
        load(tmp_path, quantize="int8")
