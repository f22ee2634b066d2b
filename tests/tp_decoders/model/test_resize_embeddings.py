"""The vocabulary made longer and shorter, and its tables replaced: the same at every tensor-parallel size, and as
transformers does it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from parallel.errors import ConfigError
from parallel.ranks.gather_parameter import whole_tensor
from parallel.ranks.group import Group
from tests.tp_decoders.checkpoint.test_load import full, write
from tp_decoders import load, save
from tp_decoders.adapters.lora import attach
from tp_decoders.model.lora_config import LoraConfig
from tp_decoders.padded.padded_model import PaddedModel

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 30]])
EMBED = {"gpt2": "transformer.wte.weight", "gpt_neox": "gpt_neox.embed_in.weight", "mpt": "transformer.wte.weight"}


@pytest.mark.parametrize(
    "size, multiple, wanted", [(40, None, 40), (33, 16, 48), (None, 64, 64), (7, None, 7), (9, 4, 12)]
)
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "mpt"])
def test_old_rows_and_logits_are_transformers(
    family: str, size: int | None, multiple: int | None, wanted: int, tmp_path: Path
) -> None:
    write(tmp_path / "in", family)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "in", attn_implementation="eager").eval()
    theirs.resize_token_embeddings(size, pad_to_multiple_of=multiple)
    model: Any = load(tmp_path / "in")
    returned = model.resize_token_embeddings(size, pad_to_multiple_of=multiple)
    assert returned is model.get_input_embeddings() and returned.weight.shape == (wanted, 24)
    assert model.config.vocab_size == theirs.config.vocab_size == wanted
    assert (model.head.weight is model.embed.weight) == model.config.tie
    kept, ids = min(31, wanted), IDS.clamp(max=wanted - 1)
    for ours, other in ((model.embed, theirs.get_input_embeddings()), (model.head, theirs.get_output_embeddings())):
        assert torch.equal(ours.weight[:kept], other.weight[:kept])
        torch.testing.assert_close(ours.weight, other.weight, rtol=0, atol=1e-3)  # theirs draw around the mean
    with torch.no_grad():
        logits = PaddedModel(model)(ids).logits
        torch.testing.assert_close(logits[..., :kept], theirs(ids).logits[..., :kept], rtol=1e-4, atol=1e-4)
    save(model, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, logits, rtol=1e-4, atol=1e-4)
    assert load(tmp_path / "out").config == model.config


def resized(group: Group, folder: str, out: str, size: int, mean: bool) -> Tensor:
    model: Any = load(folder, group=group)
    model.resize_token_embeddings(size, mean_resizing=mean)
    assert model.head.shards.size == model.embed.shards.size == size
    save(model, out)
    return whole_tensor(model.embed.weight, group)


@pytest.mark.parametrize("family, size, mean", [("gpt2", 37, True), ("gpt_neox", 100, False), ("gpt_neox", 5, True)])
def test_every_number_of_ranks_gives_the_same_weights(
    family: str, size: int, mean: bool, tmp_path: Path, ranks: Callable[..., list[Any]]
) -> None:
    tensors = write(tmp_path / "in", family)
    resized(Group.single(), str(tmp_path / "in"), str(tmp_path / "out1"), size, mean)
    alone = load_file(tmp_path / "out1" / "model.safetensors")
    for count in (2, 3):
        found = ranks(count, resized, str(tmp_path / "in"), str(tmp_path / f"out{count}"), size, mean)
        assert all(torch.equal(table, alone[EMBED[family]]) for table in found)
        together = load_file(tmp_path / f"out{count}" / "model.safetensors")
        assert together.keys() == alone.keys() == tensors.keys()
        assert all(torch.equal(together[name], tensor) for name, tensor in alone.items())
    assert json.loads((tmp_path / "out3" / "config.json").read_text())["vocab_size"] == size


def test_new_rows_are_the_mean_or_drawn_and_train_on(tmp_path: Path) -> None:
    tensors = write(tmp_path, "gpt_neox")
    model: Any = load(tmp_path, dtype=torch.bfloat16)
    model.embed.weight.requires_grad_(False)
    model.resize_token_embeddings(35)
    mean = tensors["gpt_neox.embed_in.weight"].bfloat16().float().mean(0).bfloat16()
    assert torch.equal(model.embed.weight[31:], mean.expand(4, -1))
    assert not model.embed.weight.requires_grad and model.head.weight.requires_grad
    model.resize_token_embeddings(45, mean_resizing=False)
    assert torch.equal(model.embed.weight[31:35], mean.expand(4, -1)) and model.embed.weight[35:].std() > 0.01
    loss = PaddedModel(model)(IDS, labels=IDS).loss
    assert loss is not None
    loss.backward()
    assert model.head.weight.grad.shape == (45, 24)


def test_nothing_asked_changes_nothing(tmp_path: Path) -> None:
    write(tmp_path, "gpt2")
    model: Any = load(tmp_path)
    before = model.embed
    assert model.resize_token_embeddings() is before and model.resize_token_embeddings(31) is before


def test_tables_are_replaced_whole(tmp_path: Path) -> None:
    write(tmp_path / "tied", "gpt2")
    write(tmp_path / "untied", "gpt_neox")
    tied, untied = load(tmp_path / "tied"), load(tmp_path / "untied")
    table = nn.Embedding(50, 24)
    tied.set_input_embeddings(table)
    assert torch.equal(tied.get_input_embeddings().weight, table.weight)
    assert tied.config.vocab_size == 50 and PaddedModel(tied)(IDS).logits.shape == (2, 5, 50)
    head = full(untied)["embed_out.weight"].clone()
    untied.set_input_embeddings(nn.Embedding(31, 24))
    assert torch.equal(full(untied)["embed_out.weight"], head)
    untied.set_output_embeddings(torch.ones(31, 24))
    assert torch.equal(untied.get_output_embeddings().weight, torch.ones(31, 24))  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"call resize_token_embeddings\(50\) first"):
        untied.set_input_embeddings(table)
    with pytest.raises(ConfigError, match="call set_input_embeddings"):
        tied.set_output_embeddings(table.weight)
    with pytest.raises(ConfigError, match=r"shape \[50, 8\]; give \[vocabulary, 24\]"):
        tied.set_input_embeddings(nn.Embedding(50, 8))
    with pytest.raises(ConfigError, match=r"a table of torch.int64, shape \[50, 24\]; give"):
        untied.set_input_embeddings(torch.zeros(50, 24, dtype=torch.int64))


@pytest.mark.parametrize("size, multiple", [(0, None), (-3, None), (2.5, None), (True, None), (40, 0), (40, 1.5)])
def test_sizes_that_make_no_sense_are_refused(size: Any, multiple: Any, tmp_path: Path) -> None:
    write(tmp_path, "gpt2")
    with pytest.raises(ConfigError, match="give a whole number of at least 1"):
        load(tmp_path).resize_token_embeddings(size, multiple)


def test_a_model_without_a_head_and_one_with_an_adapter(tmp_path: Path) -> None:
    write(tmp_path, "gpt_neox")
    classifier = load(tmp_path, "sequence-classification", labels=3)
    assert classifier.get_output_embeddings() is None
    assert classifier.resize_token_embeddings(40).weight.shape == (40, 24)
    with pytest.raises(ConfigError, match="has no vocabulary head"):
        classifier.set_output_embeddings(torch.ones(40, 24))
    model = load(tmp_path)
    attach(model, LoraConfig(targets=("embed_out",)))
    with pytest.raises(ConfigError, match="merge and detach it first"):
        model.resize_token_embeddings(40)
