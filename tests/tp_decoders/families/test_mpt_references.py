"""An MPT's options as transformers' own MPT takes them and as llm-foundry does: who wrote a file decides, a setting
overrides, and both equal their reference at one rank and at two."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from launch.main import main
from launch.presets import build as build_settings
from launch.presets import overrides
from launch.serving.serve_config import ServeConfig
from parallel.attention.forward_pass import Pass
from parallel.errors import ConfigError
from parallel.ranks.group import Group
from tests.tp_decoders.families.dense_mpt import SIZES, DenseMpt, random_weight
from tp_decoders import load, save
from tp_decoders.families.mpt_config import FOUNDRY, TRANSFORMERS, reference_of
from tp_decoders.model.config import Dropout
from tp_decoders.registry import config_from_hf, read_config

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
NOT_HEEDED: dict[str, dict[str, Any]] = {
    "no ALiBi": {"attn_config": {"alibi": False}},
    "no ALiBi, no positions": {"attn_config": {"alibi": False}, "learned_pos_emb": False},
    "steeper ALiBi": {"attn_config": {"alibi_bias_max": 16}},
    "norms of q and k": {"attn_config": {"qk_ln": True}},
    "multi-query": {"attn_config": {"attn_type": "multiquery_attention"}},
    "logit scale": {"logit_scale": 0.3},
    "logit scale by width": {"logit_scale": "inv_sqrt_d_model"},
    "biases": {"no_bias": False},
    "narrow MLP": {"expansion_ratio": 2},
}
HEEDED: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "clipped": {"attn_config": {"clip_qkv": 0.5}},
    "not clipped": {"attn_config": {"clip_qkv": 0}},
    "softmax scale": {"attn_config": {"softmax_scale": 0.7}},
    "untied": {"tie_word_embeddings": False},
    "norm epsilon": {"layer_norm_epsilon": 0.1},
}
TO_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "prefixes": {"attn_config": {"prefix_lm": True}},
    "sequence ids": {"attn_config": {"attn_uses_sequence_id": True}},
    "rotary": {"attn_config": {"rope": True, "rope_theta": 500}},
    "another norm": {"norm_type": "rmsnorm"},
    "embedding fraction": {"embedding_fraction": 0.5},
    "another MLP": {"ffn_config": {"ffn_type": "mptgeglu"}},
}


def logits_of(group: Group, folders: Sequence[str], mpt_reference: str = "auto") -> list[torch.Tensor]:
    tokens, found = torch.tensor(TOKENS), []
    for folder in folders:
        model = load(folder, group=group, mpt_reference=mpt_reference)
        with torch.no_grad():
            found.append(model.head.gather(model(tokens, Pass.packed([len(tokens)]))))
    return found


def written_by_transformers(folder: Path, **options: Any) -> torch.Tensor:
    """Its logits."""
    model = transformers.MptForCausalLM(transformers.MptConfig(**SIZES | options)).eval()
    for name, parameter in model.named_parameters():
        parameter.data = random_weight(name, tuple(parameter.shape))
    model.save_pretrained(folder)
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0]


def check(ranks: Callable[..., list[Any]], wanted: dict[Path, torch.Tensor], mpt_reference: str = "auto") -> None:
    for size in (1, 2):
        found = ranks(size, logits_of, [str(folder) for folder in wanted], mpt_reference)[0]
        for (folder, logits), got in zip(wanted.items(), found, strict=True):
            assert float((got - logits).abs().max()) < 1e-4 * float(logits.abs().max()), f"{folder.name}, tp {size}"


def test_what_transformers_wrote_is_computed_as_by_transformers(
    ranks: Callable[..., list[Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cases = NOT_HEEDED | HEEDED | TO_TRANSFORMERS
    check(ranks, {tmp_path / name: written_by_transformers(tmp_path / name, **cases[name]) for name in cases})
    for name in NOT_HEEDED:
        caplog.clear()
        read_config(tmp_path / name)
        (line,) = [record.getMessage() for record in caplog.records]
        assert "read as transformers reads it" in line and "mpt_reference=llm-foundry says otherwise" in line


def test_what_llm_foundry_wrote_is_computed_as_by_llm_foundry(
    ranks: Callable[..., list[Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = {}
    for name, options in NOT_HEEDED.items():
        dense = DenseMpt(**options, architectures=["MPTForCausalLM"], transformers_version="4.40.0")
        (tmp_path / name).mkdir()
        dense.save(tmp_path / name)
        wanted[tmp_path / name] = dense.logits(torch.tensor(TOKENS)).detach()
    check(ranks, wanted)
    for name in set(NOT_HEEDED) - {"no ALiBi, no positions"}:
        caplog.clear()
        read_config(tmp_path / name)
        assert "read as llm-foundry reads it" in caplog.records[0].getMessage()


def test_a_setting_overrides_the_origin_and_stays_with_what_is_saved(
    ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    """ALiBi's steepness needs no other tensors, so that the same file can be read both ways."""
    hf = {"attn_config": {"alibi_bias_max": 16}}
    theirs = written_by_transformers(tmp_path / "theirs", **hf)
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config | {"architectures": ["MPTForCausalLM"]}))
    check(ranks, {tmp_path / "theirs": theirs}, TRANSFORMERS)
    (by_origin,) = logits_of(Group.single(), [str(tmp_path / "theirs")])
    assert not torch.allclose(by_origin, theirs, atol=1e-3)
    save(load(tmp_path / "theirs", mpt_reference=TRANSFORMERS), tmp_path / "saved")
    arguments = [str(tmp_path / "theirs"), str(tmp_path / "converted"), "--mpt-reference", TRANSFORMERS]
    assert main(["convert", *arguments]) == 0
    check(ranks, {tmp_path / "saved": theirs, tmp_path / "converted": theirs})
    again = load(tmp_path / "theirs", "sequence-classification", labels=2)
    save(again, tmp_path / "classifier")  # by a class that transformers has, too
    assert reference_of(json.loads((tmp_path / "classifier" / "config.json").read_text())) == FOUNDRY


@pytest.mark.parametrize(
    ("hf", "reference"),
    [
        ({}, FOUNDRY),
        ({"architectures": ["MPTForCausalLM"], "transformers_version": "4.28.1"}, FOUNDRY),
        ({"architectures": ["MptForCausalLM"], "auto_map": {"AutoConfig": "x.MPTConfig"}}, TRANSFORMERS),
        ({"architectures": ["MptForSequenceClassification"]}, TRANSFORMERS),
        ({"auto_map": {"AutoConfig": "configuration_mpt.MPTConfig"}, "transformers_version": "4.31.0"}, FOUNDRY),
        ({"transformers_version": "4.57.6"}, TRANSFORMERS),
        ({"transformers_version": "4.57.6", "ffn_config": {"ffn_type": "mptmlp"}}, FOUNDRY),
        ({"transformers_version": "4.57.6", "attn_config": {"rope": False}}, FOUNDRY),
        ({"architectures": ["MPTForCausalLM"], "mpt_reference": TRANSFORMERS}, TRANSFORMERS),
        ({"transformers_version": "4.57.6", "mpt_reference": "auto"}, TRANSFORMERS),
        ({"architectures": "MptForCausalLM", "attn_config": []}, FOUNDRY),
    ],
)
def test_who_wrote_a_file_decides(hf: dict[str, Any], reference: str) -> None:
    assert reference_of(hf) == reference


def test_dropout_is_read_as_either_reads_it() -> None:
    hf = {"model_type": "mpt", "attn_config": {"attn_pdrop": 0.2}, "emb_pdrop": 0.3, "resid_pdrop": 0.4}
    assert config_from_hf(hf, mpt_reference=TRANSFORMERS).dropout == Dropout(attention=0.2, residual=0.2)
    assert config_from_hf(hf).dropout == Dropout(embedding=0.3, attention=0.2, residual=0.4)


def test_the_setting_is_checked_and_reaches_the_commands() -> None:
    with pytest.raises(ConfigError, match="mpt_reference is 'mosaic'; choose one of auto, transformers, llm-foundry"):
        config_from_hf({"model_type": "gpt2"}, mpt_reference="mosaic")
    with pytest.raises(ConfigError, match="mosaic is no choice of any family; there is mpt_reference"):
        config_from_hf({"model_type": "mpt"}, mosaic="auto")
    with pytest.raises(ConfigError, match="mpt_reference = 'mosaic' is not supported"):
        config_from_hf({"model_type": "mpt", "mpt_reference": "mosaic"})
    config = build_settings(ServeConfig, [overrides(["model=m", "mpt_reference=llm-foundry"])])
    assert isinstance(config, ServeConfig) and config.mpt_reference == FOUNDRY
