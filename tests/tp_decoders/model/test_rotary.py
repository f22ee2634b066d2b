"""Rotary tables and rotation against transformers, dynamic scaling against its token-by-token generation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from parallel.attention.forward_pass import Pass
from parallel.errors import ConfigError
from parallel.layers.rotary import Rotation, rotate, rotated
from parallel.matmul import products
from tests.tp_decoders.families.parity import NEOX, hf
from tp_decoders import load
from tp_decoders.model.rotary import Rotary
from tp_decoders.model.rotary_config import RotaryConfig
from tp_decoders.registry import config_from_hf

ROUNDING = 2.0**-23
"""Their cosines and frequencies are those of this machine's libraries, ours the same everywhere (parallel/exact.py)."""


def reference(size: int, head_dim: int, **options: object) -> GPTNeoXRotaryEmbedding:
    config = transformers.GPTNeoXConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        rotary_pct=size / head_dim,
        max_position_embeddings=64,
        **options,
    )
    return GPTNeoXRotaryEmbedding(config)


@pytest.mark.parametrize(
    ("kind", "factor", "scaling"),
    [("default", 1.0, None), ("linear", 3.0, {"type": "linear", "factor": 3.0})],
)
def test_tables_are_those_of_transformers_to_a_rounding(
    kind: str, factor: float, scaling: dict[str, object] | None
) -> None:
    positions = torch.tensor([5, 0, 63, 17, 17])
    table = Rotary(RotaryConfig(size=16, base=500.0, max_positions=64, kind=kind, factor=factor)).at(positions)
    cos, sin = reference(16, 32, rotary_emb_base=500, rope_scaling=scaling)(torch.zeros(1), positions[None])
    torch.testing.assert_close(table.cos, cos[0, :, :8], rtol=0, atol=ROUNDING)
    torch.testing.assert_close(table.sin, sin[0, :, :8], rtol=0, atol=ROUNDING)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "scaling",
    [
        {**LLAMA3, "original_max_position_embeddings": 512},
        {**LLAMA3, "original_max_position_embeddings": 24, "low_freq_factor": 0.25},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "truncate": False},
        {"rope_type": "yarn", "factor": 3.0, "beta_fast": 8, "beta_slow": 2, "attention_factor": 0.7},
        {"rope_type": "yarn", "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.0},
    ],
)
def test_tables_of_stretched_frequencies_are_those_of_transformers_to_a_rounding(scaling: dict[str, object]) -> None:
    theirs = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=2, max_position_embeddings=1024, rope_theta=5000.0, rope_scaling=scaling
    )
    positions = torch.tensor([5, 0, 1023, 17, 300])
    config = config_from_hf(json.loads(json.dumps(theirs.to_dict())))
    plain = config_from_hf({**theirs.to_dict(), "rope_scaling": None})
    assert config.rotary is not None and plain.rotary is not None
    table = Rotary(config.rotary).at(positions)
    cos, sin = LlamaRotaryEmbedding(theirs)(torch.zeros(1), positions[None])
    angles = positions[:, None] * 5000.0 ** -(torch.arange(32) / 32)  # in which a frequency's last bit shows
    for ours, wanted in ((table.cos, cos), (table.sin, sin)):
        assert ((ours - wanted[0, :, :32]).abs() <= ROUNDING * (1 + angles)).all()
    assert config.max_positions >= 1024
    unscaled = Rotary(plain.rotary).at(positions)
    assert not torch.allclose(unscaled.cos, table.cos, atol=1e-2), "else it would scale nothing"


@pytest.mark.parametrize("position", [3, 63, 64, 100, 127])
def test_dynamic_scaling_depends_on_the_tokens_own_position(position: int) -> None:
    ours = Rotary(RotaryConfig(size=16, base=500.0, max_positions=64, kind="dynamic", factor=2.0))
    module = reference(16, 32, rotary_emb_base=500, rope_scaling={"type": "dynamic", "factor": 2.0})
    cos, _ = module(torch.zeros(1), torch.tensor([[position]]))  # transformers, for a sequence that ends here
    together = ours.at(torch.tensor([2, 127, position])).cos[2]
    torch.testing.assert_close(together, cos[0, 0, :8], rtol=2e-5, atol=2e-6)
    assert ours.config.reach == 128


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotation_in_place_and_with_gradient_have_the_same_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(5, 4, 3, 12).to(dtype)
    before = qkv.clone()
    rotation = Rotary(RotaryConfig(size=8, base=100.0, max_positions=64)).at(torch.arange(5) * 7)
    trained = rotated(before.clone().requires_grad_(), rotation)
    served = rotated(qkv, rotation)
    for ours, theirs, start in zip(served, trained, before.unbind(2), strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(ours[..., 8:], start[..., 8:])
    assert served[0].data_ptr() == qkv.data_ptr()
    assert not torch.equal(served[0], before[:, :, 0])
    assert torch.equal(served[2], before[:, :, 2])


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rotation_of_strided_memory_arrives_there(
    dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr(products, "native_products", lambda: False)
    torch.manual_seed(0)
    rotation = Rotary(RotaryConfig(size=8, base=500.0, max_positions=64)).at(torch.tensor([5, 0, 63, 17]))
    whole = torch.randn(4, 6, 3, 32).to(dtype)
    for view in (
        lambda x: x,
        lambda x: x[..., ::2],
        lambda x: x[:, ::2],
        lambda x: x[:, :1],
        lambda x: x.transpose(0, 1)[:4, :4],
    ):
        given = view(whole.clone())
        plain = given.contiguous().clone()
        want = [rotate(x.contiguous(), rotation) for x in plain.unbind(2)[:2]]
        q, k, v = rotated(given, rotation)
        assert torch.equal(q, want[0]) and torch.equal(k, want[1]) and torch.equal(v, plain[:, :, 2])


def test_rotation_and_its_gradient_equal_transformers() -> None:
    torch.manual_seed(1)
    q = torch.randn(5, 3, 12, dtype=torch.float32).requires_grad_()
    rotation = Rotary(RotaryConfig(size=8, base=100.0, max_positions=64)).at(torch.arange(5))
    whole = Rotation(torch.cat([rotation.cos] * 2, -1), torch.cat([rotation.sin] * 2, -1))
    theirs, _ = apply_rotary_pos_emb(q, q, whole.cos, whole.sin)
    weight = torch.randn_like(q)
    (expected,) = torch.autograd.grad((theirs * weight).sum(), q)
    ours = rotate(q, rotation)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad((ours * weight).sum(), q)[0], expected)


def test_generation_beyond_the_trained_context_equals_transformers(tmp_path: object) -> None:
    torch.manual_seed(2)
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    model = hf("GPTNeoX", NEOX, max_position_embeddings=8, rope_scaling=scaling, rotary_pct=1.0)()
    model.save_pretrained(tmp_path)
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    expected = model.generate(prompt, max_new_tokens=11, do_sample=False, pad_token_id=0, eos_token_id=None)[0].tolist()
    ours, decoder = prompt[0].tolist(), load(str(tmp_path))
    assert decoder.config.max_positions == 16
    while len(ours) < 16:
        with torch.no_grad():
            logits = decoder(torch.tensor(ours), Pass.packed([len(ours)]))
        ours.append(decoder.head.argmax(logits[-1:]).ids.item())
    assert ours == expected


def rotary_of(**hf: object) -> RotaryConfig:
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 64}
    rotary = config_from_hf({"model_type": "gpt_neox", **sizes, **hf}).rotary
    assert isinstance(rotary, RotaryConfig)
    return rotary


HALF = RotaryConfig(size=16, base=500.0, max_positions=64)
TWICE = RotaryConfig(size=16, base=500.0, max_positions=64, kind="linear", factor=2.0)
WHOLE = {"rope_type": "default", "rope_theta": 500, "partial_rotary_factor": 0.5}
OLD = {"rotary_pct": 0.5, "rotary_emb_base": 500}


@pytest.mark.parametrize(
    ("hf", "wanted"),
    [
        (OLD, HALF),
        ({"partial_rotary_factor": 0.5, "rope_theta": 500.0}, HALF),
        ({**OLD, "partial_rotary_factor": 0.5, "rope_theta": 500, "rope_scaling": None, "rope_parameters": None}, HALF),
        ({**OLD, "rotary_pct": None, "partial_rotary_factor": 0.5}, HALF),
        ({"rope_parameters": WHOLE}, HALF),
        ({"rope_parameters": WHOLE, "rotary_pct": 0.25, "rotary_emb_base": 7}, HALF),
        ({"rope_scaling": {}, "rope_parameters": WHOLE}, HALF),
        ({"rope_scaling": WHOLE, "rope_parameters": {"rope_theta": 7}}, HALF),
        ({**OLD, "rope_parameters": {"rope_type": None, "type": "default", "factor": 3.0}}, HALF),
        ({**OLD, "rope_scaling": {"type": "linear", "factor": 2}}, TWICE),
        ({**OLD, "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}}, TWICE),
        ({"rope_parameters": {**WHOLE, "rope_type": "linear", "factor": 2.0}}, TWICE),
    ],
)
def test_every_spelling_of_the_rotary_settings_is_read(hf: dict[str, object], wanted: RotaryConfig) -> None:
    assert rotary_of(**hf) == wanted


def test_linear_scaling_extends_the_context_by_its_factor() -> None:
    assert rotary_of(**OLD, rope_scaling={"type": "linear", "factor": 2.5}).reach == 160
    counted = {"rope_type": "linear", "factor": 2.0, "original_max_position_embeddings": 32}
    assert rotary_of(**OLD, rope_parameters=counted).reach == 64
    with pytest.raises(ConfigError, match="makes a context of more than"):
        rotary_of(**OLD, rope_scaling={"type": "linear", "factor": 1e300})


def test_a_sequence_in_the_extended_context_has_the_logits_of_transformers(tmp_path: Path) -> None:
    reference = hf("GPTNeoX", NEOX, rope_scaling={"type": "linear", "factor": 4.0})()
    reference.save_pretrained(tmp_path)
    model, tokens = load(tmp_path), torch.randint(31, (120,), generator=torch.Generator().manual_seed(2))
    assert model.config.max_positions == 128
    with torch.no_grad():
        wanted = reference(tokens[None]).logits[0]
        torch.testing.assert_close(model(tokens, Pass.packed([120])), wanted, rtol=1e-4, atol=1e-4)
