"""Original GPT-NeoX checkpoints: written here as DeepSpeed writes them, converted, opened by transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from launch.main import main
from parallel.errors import CheckpointError, ConfigError
from tp_decoders.convert.deepspeed import DeepSpeedSource, find_layers, place_of
from tp_decoders.convert.neox_settings import hf_of_settings
from tp_decoders.convert.rewrite import tensor_shapes
from tp_decoders.registry import config_from_hf

SETTINGS = """
# as EleutherAI's 20B.yml: one mapping in braces, names with - and with _
{
  "pipe-parallel-size": 4,
  "num-layers": 3, "hidden-size": 48, "num-attention-heads": 6, "max-position-embeddings": 64,
  "norm": "layernorm", "pos-emb": "rotary", "rotary_pct": 0.25, "no-weight-tying": true, "gpt_j_residual": true,
  "bias-gelu-fusion": true, "fp16": {"enabled": true, "loss_scale": 0},
  "attention-config": [[["global"], 3]],
}
"""
COLUMN = ("attention.query_key_value", "mlp.dense_h_to_4h")
ROW = ("attention.dense", "mlp.dense_4h_to_h")
NORMS = ("input_layernorm", "post_attention_layernorm")
TOKENS = torch.tensor([[5, 17, 60, 2, 95, 33, 8, 8]])


def tiny(**options: Any) -> GPTNeoXForCausalLM:
    """A random model whose row biases are multiples of 1/256, so that they can be divided into exact parts."""
    config = GPTNeoXConfig(
        vocab_size=96, hidden_size=48, num_hidden_layers=3, num_attention_heads=6, intermediate_size=192,
        max_position_embeddings=64, rotary_pct=0.25, hidden_act="gelu_fast", **options,
    )  # fmt: skip
    model = GPTNeoXForCausalLM._from_config(config, attn_implementation="eager").eval()
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape) * (0.3 if parameter.dim() == 2 else 0.2)
        parameter.data = (values * 256).round() / 256 + (name.endswith("norm.weight"))
    return model


def parts_of(key: str, value: Tensor, num_parts: int) -> list[Tensor]:
    """How one tensor lies in the parts, by what its layer is."""
    module, leaf = key.rsplit(".", 1)
    if module in ROW and leaf == "bias":  # every rank adds its own: only the sum means something
        generator = torch.Generator().manual_seed(len(key))
        drawn = [(torch.randn(value.shape, generator=generator) * 256).round() / 256 for _ in range(num_parts - 1)]
        return [*drawn, value - sum(drawn)]
    if module in ROW:
        return list(value.chunk(num_parts, 1))
    if module in (*COLUMN, "word_embeddings", "final_linear"):
        return list(value.chunk(num_parts, 0))
    return [value] * num_parts


def layers_of(model: GPTNeoXForCausalLM) -> dict[int, dict[str, Tensor]]:
    """The model's tensors by the file's layer number and key."""
    n, layers = model.config.num_hidden_layers, {}
    layers[0] = {"word_embeddings.weight": model.gpt_neox.embed_in.weight.data}
    for number, block in enumerate(model.gpt_neox.layers):
        layers[number + 2] = {**block.state_dict(), "attention.rotary_emb.inv_freq": torch.ones(3)}
    layers[n + 3] = {f"norm.{leaf}": value for leaf, value in model.gpt_neox.final_layer_norm.state_dict().items()}
    if not model.config.tie_word_embeddings:
        layers[n + 4] = {"final_linear.weight": model.embed_out.weight.data}
    return layers


def write(folder: Path, model: GPTNeoXForCausalLM, num_parts: int, dtype: torch.dtype = torch.float32) -> Path:
    folder.mkdir(parents=True)
    for layer, tensors in layers_of(model).items():
        divided = {key: parts_of(key, value, num_parts) for key, value in tensors.items()}
        for part in range(num_parts):
            content = {key: parts[part].clone().to(dtype) for key, parts in divided.items()}
            torch.save(content, folder / f"layer_{layer:02d}-model_{part:02d}-model_states.pt")
    return folder


def write_config(model: GPTNeoXForCausalLM, path: Path) -> Path:
    path.write_text(json.dumps(model.config.to_dict()))
    return path


def convert(folder: Path, out: Path, *options: str) -> int:
    return main(["convert", str(folder), str(out), "--from", "deepspeed", *options])


@pytest.mark.parametrize("num_parts", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}, {"attention_bias": False}], ids=str)
def test_the_parts_make_the_model_they_were_cut_from(num_parts: int, options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny(**options)
    folder = write(tmp_path / "step", model, num_parts)
    config = write_config(model, tmp_path / "config.json")
    assert convert(folder, tmp_path / "out", "--config", str(config), "--max-shard-size", "100KB") == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    wanted = model.state_dict()
    assert found.state_dict().keys() == wanted.keys()
    for name, value in found.state_dict().items():
        assert torch.equal(value, wanted[name]), name
    with torch.no_grad():
        assert torch.equal(found(TOKENS).logits, model(TOKENS).logits)


def test_the_step_and_the_settings_are_found_as_in_the_20b_release(tmp_path: Path) -> None:
    model = tiny()
    write(tmp_path / "20B" / "global_step150000", model, 2, torch.float16)
    (tmp_path / "20B" / "latest").write_text("global_step150000\n")
    (tmp_path / "20B" / "configs").mkdir()
    (tmp_path / "20B" / "configs" / "20B.yml").write_text(SETTINGS)
    (tmp_path / "20B" / "20B_tokenizer.json").write_text("{}")
    assert convert(tmp_path / "20B", tmp_path / "out", "--tokenizer", str(tmp_path / "20B" / "20B_tokenizer.json")) == 0
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", attn_implementation="eager")
    assert found.dtype is torch.float16, "the checkpoint's own"
    assert found.config.hidden_act == "gelu_fast" and found.config.vocab_size == 96
    assert all(torch.equal(value, model.state_dict()[name].half()) for name, value in found.state_dict().items())


def test_norms_that_drifted_apart_are_averaged_and_sums_are_rounded_once(tmp_path: Path) -> None:
    model = tiny()
    folder = write(tmp_path / "step", model, 3, torch.float16)
    given = []
    for part in range(3):
        path = folder / f"layer_02-model_{part:02d}-model_states.pt"
        content = torch.load(path)
        content["input_layernorm.weight"] += 0.125 * part
        content["attention.dense.bias"] = torch.full((48,), (2048.0, 1.0, 1.0)[part], dtype=torch.float16)
        given.append(content["input_layernorm.weight"].double())
        torch.save(content, path)
    source = DeepSpeedSource(folder, config_from_hf(model.config.to_dict()))
    assert torch.allclose(source.read("gpt_neox.layers.0.input_layernorm.weight"), sum(given) / 3, rtol=0, atol=1e-9)
    bias = source.read("gpt_neox.layers.0.attention.dense.bias").half()
    assert bool((bias == 2050).all()), "2048 + 1 in float16 is 2048: added one by one, both ones would be lost"


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def change(name: str, edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        content = torch.load(folder / name)
        edit(content)
        torch.save(content, folder / name)

    return apply


def put(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-200])


FILE = "layer_03-model_01-model_states.pt"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing layer": (
        lambda folder: [remove(path.name)(folder) for path in folder.glob("layer_03-*")],
        "has no layer_03-model_00-model_states.pt, layer_03-model_01-model_states.pt, which a model of 3 blocks",
    ),
    "a missing part": (remove(FILE), f"has no {FILE}"),
    "a missing part of the embedding": (remove("layer_00-model_00-model_states.pt"), "no layer_00-model_00-model_sta"),
    "a layer too many": (
        lambda folder: torch.save({}, folder / "layer_08-model_00-model_states.pt"), "holds layer_08-model_00",
    ),
    "another shape": (
        change(FILE, lambda t: t.update({"attention.dense.weight": torch.ones(48, 23)})),
        rf"attention.dense.weight in .* \[48, 48\] .* {FILE} \[48, 23\]",
    ),
    "a bias of another shape": (
        change(FILE, lambda t: t.update({"mlp.dense_4h_to_h.bias": torch.ones(24)})),
        rf"mlp.dense_4h_to_h.bias in .* \[48\] .* {FILE} \[24\]",
    ),
    "a missing tensor": (change(FILE, lambda t: t.pop("mlp.dense_h_to_4h.bias")), f"{FILE} holds no mlp.dense_h_to_4h"),
    "a tensor too many": (change(FILE, lambda t: t.update(extra=torch.ones(2))), f"{FILE} holds extra, which"),
    "integers": (
        change(FILE, lambda t: t.update({"mlp.dense_4h_to_h.bias": torch.ones(48, dtype=torch.int64)})),
        f"{FILE}: mlp.dense_4h_to_h.bias is not of a floating-point type",
    ),
    "no torch file": (put(FILE, b"<html>404</html>"), f"{FILE} cannot be read"),
    "an empty file": (put(FILE, b""), f"{FILE} cannot be read"),
    "a file cut short": (cut(FILE), f"{FILE} cannot be read"),
    "more than tensors": (change(FILE, lambda t: t.update(step=3)), f"{FILE} does not hold a table of tensors"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_an_error_that_names_the_file(kind: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[kind]
    model = tiny()
    folder = write(tmp_path / "step", model, 2)
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        DeepSpeedSource(folder, config_from_hf(model.config.to_dict()))


def test_what_does_not_belong_together_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny()
    folder = write(tmp_path / "step", model, 2)
    for given, message in (
        ([], "give --config, as in --config gpt-neox-20b"),
        (["--config", "gpt2"], "are of GPT-NeoX models, the configuration is of a gpt2"),
        (["--config", "gpt-neox-20b"], "has no layer_05-model_00-model_states.pt, "),
        (["--config", "gpt-neox-20b"], " and 78 more, which a model of 44 blocks in 2 model-parallel parts has"),
        (["--config", str(tmp_path / "none.json")], "none.json cannot be read as JSON"),
        (["--config", "gpt-neox-20b", "--tokenizer", str(folder)], "give a folder with a tokenizer"),
    ):
        assert convert(folder, tmp_path / "out", *given) == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["step"]


def test_a_folder_without_layers_says_what_to_give(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("../elsewhere")
    with pytest.raises(CheckpointError, match="it should name a folder beside it"):
        find_layers(tmp_path)
    (tmp_path / "latest").write_text("gone")
    with pytest.raises(CheckpointError, match="gone holds no layer_XX-model_YY"):
        find_layers(tmp_path)


GIVEN = {
    "num_layers": 3, "hidden_size": 48, "num_attention_heads": 6, "max_position_embeddings": 64, "pos_emb": "rotary",
}  # fmt: skip


def test_settings_mean_what_they_mean_in_gpt_neox() -> None:
    plain = hf_of_settings(GIVEN, 96, "x.yml")
    assert (plain["hidden_act"], plain["rotary_pct"], plain["use_parallel_residual"]) == ("gelu", 1.0, False)
    assert plain["tie_word_embeddings"] and plain["intermediate_size"] == 192
    fused = hf_of_settings({**GIVEN, "bias-gelu-fusion": True, "no-weight-tying": True}, 96, "x.yml")
    assert fused["hidden_act"] == "gelu_fast" and not fused["tie_word_embeddings"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pos-emb": "alibi"}, "pos_emb = 'alibi'"),
        ({"norm": "rmsnorm"}, "norm = 'rmsnorm'"),
        ({"activation": "swiglu"}, "activation = 'swiglu'"),
        ({"gpt-j-tied": True}, "gpt_j_tied = True"),
        ({"attention-config": [[["local", "global"], 2]]}, "attention_config has .'local'."),
        ({"num-kv-heads": 2}, "num_kv_heads = 2"),
        ({"hidden-size": None}, "no number for hidden_size"),
    ],
)
def test_settings_that_transformers_cannot_express_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        hf_of_settings({**{key.replace("_", "-"): value for key, value in GIVEN.items()}, **settings}, 96, "x.yml")


def test_the_20b_preset_is_what_its_own_settings_say() -> None:
    from launch.presets import find, read

    preset = read(find("gpt-neox-20b", "models")).values
    settings = {
        "num-layers": 44, "hidden-size": 6144, "num-attention-heads": 64, "max-position-embeddings": 2048,
        "norm": "layernorm", "pos-emb": "rotary", "rotary_pct": 0.25, "no-weight-tying": True, "gpt_j_residual": True,
        "bias-gelu-fusion": True,
    }  # fmt: skip
    ours = hf_of_settings(settings, 50432, "20B.yml")
    assert {key: ours[key] for key in preset} == dict(preset)
    places = {name: place_of(name, 44) for name in tensor_shapes(config_from_hf(ours))}
    assert {layer for layer, _ in places.values()} == {0, *range(2, 46), 47, 48}, "the release's files"
    assert places["gpt_neox.final_layer_norm.bias"] == (47, "norm.bias")
    assert places["embed_out.weight"] == (48, "final_linear.weight")
    assert places["gpt_neox.layers.43.mlp.dense_4h_to_h.bias"] == (45, "mlp.dense_4h_to_h.bias")
