"""Reading checkpoints: every layout and historic name, every shard, and one error that lists all that is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from parallel.errors import CheckpointError, ConfigError
from parallel.ranks.group import Group
from parallel.sharding.rules import rule_of
from tests.tp_decoders.families.parity import CASES, GPT2, LLAMA, hash_of, hf
from tp_decoders import load
from tp_decoders.model.decoder import Decoder
from tp_decoders.registry import FAMILIES, family_of

# importing transformers' GPT-BigCode warns
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

MODELS = {
    **{family: CASES[family] for family in FAMILIES if family in CASES},
    "gpt_neox": hf("GPTNeoX", {}, vocab_size=31, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, max_position_embeddings=16),  # noqa: E501
    "gpt_neox_japanese": hf("GPTNeoXJapanese", {}, vocab_size=31, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, max_position_embeddings=16),  # noqa: E501
    "mpt": hf("Mpt", {}, vocab_size=31, d_model=24, n_heads=3, n_layers=2, max_seq_len=16),
    "gpt_bigcode": hf("GPTBigCode", GPT2, n_head=3),
    "llama": hf("Llama", LLAMA, attention_bias=True),
    "mistral": hf("Mistral", LLAMA, sliding_window=None),
}  # fmt: skip


def write(folder: Path, family: str, **options: object) -> dict[str, Tensor]:
    """A tiny checkpoint of the family; its tensors by transformers' names."""
    torch.manual_seed(hash_of(family))
    MODELS[family]().save_pretrained(folder, **options)
    return load_file(folder / "model.safetensors") if (folder / "model.safetensors").exists() else {}


def full(model: Decoder) -> dict[str, Tensor]:
    """A whole model's parameters by the checkpoint's names, as the checkpoint stores them."""
    names = family_of(model.config.model_type).names
    found = {}
    for ours, parameter in model.named_parameters():
        name, theirs = names.theirs(ours)
        found[theirs] = parameter.detach().t() if name.transposed else parameter.detach()
    return found


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_one_rank_loads_every_tensor_exactly(family: str, tmp_path: Path) -> None:
    tensors = write(tmp_path, family)
    model = load(tmp_path)
    assert_same(full(model), tensors)
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_shards_of_all_ranks_join_to_the_whole(family: str, size: int, tmp_path: Path) -> None:
    write(tmp_path, family)
    whole = dict(load(tmp_path).named_parameters())
    ranks = [dict(load(tmp_path, group=Group(rank, size)).named_parameters()) for rank in range(size)]
    for name, parameter in whole.items():
        shards = [rank[name].detach() for rank in ranks]
        assert torch.equal(
            rule_of(parameter).join(shards) if size == 1 else rule_of(ranks[0][name]).join(shards), parameter
        )


def test_sharded_index_loads_like_one_file(tmp_path: Path) -> None:
    tensors = write(tmp_path / "one", "gpt_neox")
    write(tmp_path / "many", "gpt_neox", max_shard_size="10KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    assert_same(full(load(tmp_path / "many")), tensors)


def as_bin(folder: Path, tensors: dict[str, Tensor], zipped: bool = True) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_bin_loads_like_safetensors(zipped: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = write(tmp_path, "gpt2")
    as_bin(tmp_path, tensors, zipped)
    assert_same(full(load(tmp_path)), tensors)
    assert ("read whole into memory" in caplog.text) is not zipped


def test_bin_index_loads(tmp_path: Path) -> None:
    tensors = write(tmp_path, "gpt2")
    (tmp_path / "model.safetensors").unlink()
    weight_map = {name: f"part-{i % 2}.bin" for i, name in enumerate(tensors)}
    for part in set(weight_map.values()):
        torch.save({name: tensors[name] for name in tensors if weight_map[name] == part}, tmp_path / part)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(full(load(tmp_path)), tensors)


class Exploit:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return print, ("code ran while a checkpoint was read",)


def test_bin_that_would_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = write(tmp_path, "gpt2")
    as_bin(tmp_path, {**tensors, "evil": Exploit()})  # type: ignore[dict-item]
    with pytest.raises(CheckpointError, match="pytorch_model.bin cannot be read"):
        load(tmp_path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("family", FAMILIES)
def test_names_without_prefix_and_old_buffers_are_understood(family: str, tmp_path: Path) -> None:
    tensors = write(tmp_path, family)
    prefix = family_of(family).names.prefix
    layer = {"gpt2": "h.0.attn.", "gpt_bigcode": "h.0.attn.", "mpt": ""}.get(family, "layers.0.attention.")
    buffers = {f"{layer}bias": torch.ones(1, 1, 4, 4), f"{layer}masked_bias": torch.tensor(-1e4)} if layer else {}
    buffers |= {f"{layer}rotary_emb.inv_freq": torch.ones(3)} if "neox" in family else {}
    bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    for names in (bare | buffers, tensors | {prefix + name: tensor for name, tensor in buffers.items()}):
        save_file(names, tmp_path / "model.safetensors")
        assert_same(full(load(tmp_path)), tensors)


def test_all_that_is_wrong_is_listed_in_one_error(tmp_path: Path) -> None:
    tensors = write(tmp_path, "gpt2")
    del tensors["transformer.h.1.ln_1.bias"], tensors["transformer.wpe.weight"]
    tensors["transformer.h.0.mlp.c_fc.weight"] = tensors["transformer.h.0.mlp.c_fc.weight"].t().contiguous()
    tensors["transformer.h.2.ln_1.bias"] = torch.zeros(24)
    tensors["score.weight"] = torch.zeros(2, 24)
    tensors["transformer.ln_f.weight"] = torch.ones(24, dtype=torch.int64)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert "2 missing: transformer.h.1.ln_1.bias, transformer.wpe.weight" in message
    assert "2 unexpected: score.weight, transformer.h.2.ln_1.bias" in message
    assert "transformer.h.0.mlp.c_fc.weight [96, 24] instead of [24, 96]" in message
    assert "transformer.ln_f.weight of I64 instead of float32" in message


def test_tensor_under_both_names_is_refused(tmp_path: Path) -> None:
    tensors = write(tmp_path, "gpt2")
    save_file({**tensors, "wpe.weight": tensors["transformer.wpe.weight"].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="the same tensor as"):
        load(tmp_path)


def test_tied_head_may_be_stored_or_not_and_an_untied_one_must_be(tmp_path: Path) -> None:
    tensors = write(tmp_path, "gpt2")
    assert "lm_head.weight" not in tensors
    save_file({**tensors, "lm_head.weight": torch.zeros(31, 24)}, tmp_path / "model.safetensors")
    model: Any = load(tmp_path)
    assert model.head.linear.weight is model.embed.weight
    assert_same(full(model), tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(CheckpointError, match="1 missing: lm_head.weight"):
        load(tmp_path)


def test_truncated_and_corrupt_files_are_named(tmp_path: Path) -> None:
    write(tmp_path, "gpt2")
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    for broken in (content[:-100], content[:50], b"", b"\xff" * 64):
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match=rf"model.safetensors cannot be read \({len(broken)} bytes\)"):
            load(tmp_path)
    path.rename(tmp_path / "pytorch_model.bin")
    for broken in (content, b"", b"PK\x03\x04"):
        (tmp_path / "pytorch_model.bin").write_bytes(broken)
        with pytest.raises(CheckpointError, match="pytorch_model.bin cannot be read"):
            load(tmp_path)


def test_index_that_does_not_fit_its_files_is_refused(tmp_path: Path) -> None:
    tensors = write(tmp_path, "gpt2")
    (tmp_path / "model.safetensors").rename(tmp_path / "part.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    for weight_map, message in (
        (dict.fromkeys(tensors, "part.safetensors") | {"x": "other.safetensors"}, "files that are not there: other"),
        (dict.fromkeys([*tensors, "y"], "part.safetensors"), r"files do not hold: y \(in part.safetensors\)"),
        (dict.fromkeys(tensors, "../part.safetensors"), "a file in the same folder"),
        ([], "a file in the same folder"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path)
    index.write_text("{")
    with pytest.raises(CheckpointError, match="no readable 'weight_map'"):
        load(tmp_path)


def test_folder_without_weights_or_config_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no config.json"):
        load(tmp_path)
    write(tmp_path, "gpt2")
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.h5")
    with pytest.raises(CheckpointError, match=r"none of model.safetensors, .*it holds config.json, .*weights.h5"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{]")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load(tmp_path)


def test_type_is_the_checkpoints_own_unless_one_is_given(tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in write(tmp_path, "gpt2").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(full(load(tmp_path)), tensors)
    assert_same(full(load(tmp_path, dtype=torch.float32)), {name: tensor.float() for name, tensor in tensors.items()})


def test_unknown_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="task 'sorting' is unknown; choose one of causal-lm"):
        load(tmp_path, task="sorting")
