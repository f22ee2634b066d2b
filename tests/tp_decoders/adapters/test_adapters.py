"""Adapters against PEFT, both ways, on all families; which layers are chosen; merging; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

import tests.cluster.engine.tiny_models as tiny
import tp_decoders
from parallel.attention.forward_pass import Pass
from parallel.errors import CheckpointError, ConfigError
from parallel.ranks.group import Group
from parallel.sharding.rules import full_shape_of, rule_of
from tests.tp_decoders.families.dense_mpt import DenseMpt
from tests.tp_decoders.families.parity import CASES
from tp_decoders.adapters.lora import attach, detach, merge, targeted, their_module, unmerge
from tp_decoders.adapters.peft_files import load_adapter, read_adapter_config, save_adapter
from tp_decoders.checkpoint.load_save import full_tensor
from tp_decoders.model.adapted_layers import adapted
from tp_decoders.model.lora_config import LoraConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]


FAMILIES = sorted(tiny.CONFIGS)
LENGTHS = (9, 4)
TOKENS = torch.randint(tiny.VOCAB, (sum(LENGTHS),), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("base")
    return {family: tiny.save_tiny(family, root / family) for family in FAMILIES}


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.head.gather(model(TOKENS, Pass.packed(LENGTHS)))  # type: ignore[no-any-return]


def _their_logits(model: Any) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(part[None]).logits[0] for part in TOKENS.split(LENGTHS)])


def _close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def _stir(model: Any) -> None:
    """Values worth reading, the same full tensors on every rank: B of a fresh adapter is zero."""
    for name, layer, adapter in adapted(model):
        full = torch.randn(full_shape_of(adapter.b), generator=torch.Generator().manual_seed(sum(map(ord, name))))
        with torch.no_grad():
            adapter.b.copy_(rule_of(adapter.b).take(full, layer.group.rank))


def _write(group: Group, base: str, out: str, config: LoraConfig) -> Tensor:
    model = tp_decoders.load(base, group=group)
    attach(model, config, seed=3)
    _stir(model)
    save_adapter(model, out)
    return _logits(model)


def _read(group: Group, base: str, folder: str) -> tuple[Tensor, Tensor, Tensor, bool]:
    """The logits with the adapter beside the weights, merged, and unmerged; whether unmerging gave back all bits."""
    model = tp_decoders.load(base, group=group)
    plain = _logits(model)
    load_adapter(model, folder)
    beside = _logits(model)
    merge(model)
    merged = _logits(model)
    unmerge(model)
    back = _logits(model)
    detach(model)
    return beside, merged, back, torch.equal(plain, _logits(model))


ALL = LoraConfig(rank=5, alpha=12.0, targets="all-linear")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_written_here_gives_peft_the_same_logits(
    ranks: Any, checkpoints: dict[str, Path], tmp_path: Path, family: str
) -> None:
    files = set()
    for tp in (1, 2, 3):
        out = tmp_path / str(tp)
        ours = ranks(tp, _write, str(checkpoints[family]), str(out), ALL)
        base = transformers.AutoModelForCausalLM.from_pretrained(checkpoints[family]).eval()
        plain = _their_logits(base)
        theirs = _their_logits(peft.PeftModel.from_pretrained(base, out))
        assert float((theirs - plain).abs().max()) > 0.1, "else an ignored adapter would pass"
        for logits in ours:
            _close(logits, theirs)
            assert torch.equal(logits, ours[0])
        files.add((out / "adapter_model.safetensors").read_bytes())
    assert len(files) == 1, "the same file at every tensor-parallel size"


def _peft_adapter(family: str, out: Path, **options: Any) -> Tensor:
    """Saves an adapter made by PEFT with random factors; its logits."""
    model = peft.get_peft_model(tiny.tiny_model(family), peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape) * (0.3 if "lora_A" in name else 0.6)
    model.save_pretrained(out)
    return _their_logits(model)


ATTENTION = {"gpt2": "c_attn", "gpt_bigcode": "c_attn", "mpt": "Wqkv", "llama": "q_proj"}
HEADS = {"gpt_neox": "embed_out", "gpt_neox_japanese": "embed_out"}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_written_by_peft_gives_the_same_logits_here_beside_the_weights_and_merged(
    ranks: Any, checkpoints: dict[str, Path], tmp_path: Path, family: str
) -> None:
    attention = ATTENTION.get(family, "query_key_value")
    cases: list[dict[str, Any]] = [
        {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "lora_dropout": 0.1},
        {
            "r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": rf".*\.1\..*{attention}",
            "rank_pattern": {attention: 2}, "alpha_pattern": {attention: 9},
        },
    ]  # fmt: skip
    for number, options in enumerate(cases):
        out = tmp_path / str(number)
        theirs = _peft_adapter(family, out, **options)
        for tp in (1, 2, 3):
            for beside, merged, back, restored in ranks(tp, _read, str(checkpoints[family]), str(out)):
                _close(beside, theirs)
                _close(merged, theirs)
                assert torch.equal(back, beside) and restored, "unmerging gives the very bits back"


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "mpt"])
def test_the_head_can_have_an_adapter_too(
    ranks: Any, checkpoints: dict[str, Path], tmp_path: Path, family: str
) -> None:
    theirs = _peft_adapter(family, tmp_path / "theirs", r=4, target_modules=[HEADS.get(family, "lm_head")])
    for beside, merged, _, restored in ranks(2, _read, str(checkpoints[family]), str(tmp_path / "theirs")):
        _close(beside, theirs)
        _close(merged, theirs)
        assert restored


def test_an_adapter_of_the_bare_model_is_read(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    body = transformers.AutoModel.from_pretrained(checkpoints["gpt2"])
    model = peft.get_peft_model(body, peft.LoraConfig(r=2, target_modules=["c_fc"]))
    model.save_pretrained(tmp_path / "bare")
    ours = tp_decoders.load(checkpoints["gpt2"])
    load_adapter(ours, tmp_path / "bare")
    wanted = model.base_model.model.h[1].mlp.c_fc.lora_A["default"].weight
    assert torch.equal(dict(ours.named_parameters())["blocks.1.up.adapter.a"], wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokens_bits_do_not_depend_on_what_is_computed_beside_it(
    checkpoints: dict[str, Path], family: str, dtype: torch.dtype
) -> None:
    model = tp_decoders.load(checkpoints[family], dtype=dtype)
    attach(model, ALL)
    _stir(model)
    trained = model(TOKENS, Pass.packed(LENGTHS)).detach()
    assert torch.equal(_logits(model), trained), "with and without gradients"
    with torch.no_grad():
        for length in (1, 4, 9):
            alone = model(TOKENS[:length], Pass.packed([length]))
            assert torch.equal(alone, trained[:length])


def _merged_copy(group: Group, base: str, adapter: str, out: str) -> Tensor:
    model = tp_decoders.load(base, group=group)
    load_adapter(model, adapter)
    with pytest.raises(ConfigError, match="merge it before saving"):
        tp_decoders.save(model, out)
    merge(model, keep_base=False)
    tp_decoders.save(model, out)
    return _logits(model)


@pytest.mark.parametrize(
    "case", ["mpt multi-query norm", "mpt biases", "bigcode multi-head", "neox sequential", "japanese untied"]
)
def test_every_layer_of_a_familys_other_shapes_takes_an_adapter_and_gives_it_back(case: str, tmp_path: Path) -> None:
    model, base, ids = CASES[case](), tmp_path / "base", torch.tensor([3, 1, 4, 1, 5])
    base.mkdir()
    (model.save if isinstance(model, DenseMpt) else model.save_pretrained)(base)
    ours, again = tp_decoders.load(base), tp_decoders.load(base)
    attach(ours, ALL)
    _stir(ours)
    assert len(list(adapted(ours))) == 8
    save_adapter(ours, tmp_path / "adapter")
    load_adapter(again, tmp_path / "adapter")
    with torch.no_grad():
        found, wanted = (m(ids, Pass.packed([5])) for m in (again, ours))
    assert torch.equal(found, wanted)


def test_a_merged_model_is_saved_as_a_whole_checkpoint(
    ranks: Any, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    theirs = _peft_adapter("gpt2", tmp_path / "adapter", r=4, target_modules="all-linear")
    ours = ranks(2, _merged_copy, str(checkpoints["gpt2"]), str(tmp_path / "adapter"), str(tmp_path / "whole"))
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    _close(_their_logits(whole), theirs)
    _close(ours[0], theirs)


def _merged_bits(group: Group, base: str, adapter: str) -> list[bytes | None]:
    model = tp_decoders.load(base, group=group, dtype=torch.bfloat16)
    load_adapter(model, adapter)
    merge(model)
    fulls = [full_tensor(p, group) for name, p in model.named_parameters() if "adapter" not in name]
    return [None if full is None else full.contiguous().view(torch.int16).numpy().tobytes() for full in fulls]


def test_merged_weights_have_the_same_bits_at_every_size(
    ranks: Any, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    _peft_adapter("gpt_bigcode", tmp_path / "adapter", r=6, target_modules="all-linear")
    found = [ranks(tp, _merged_bits, str(checkpoints["gpt_bigcode"]), str(tmp_path / "adapter"))[0] for tp in (1, 2, 3)]
    assert found[0] == found[1] == found[2]


def _first_factors(group: Group, base: str) -> list[Tensor | None]:
    model = tp_decoders.load(base, group=group)
    attach(model, ALL, seed=11)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "adapter" not in name)
    return [full_tensor(adapter.a, group) for _, _, adapter in adapted(model)]


def test_fresh_adapters_are_the_same_at_every_size_and_change_nothing(ranks: Any, checkpoints: dict[str, Path]) -> None:
    base = checkpoints["gpt_neox"]
    one, three = (ranks(tp, _first_factors, str(base))[0] for tp in (1, 3))
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True)) and len(one) == 8
    assert all(0.5 < float(a.abs().max()) * a.shape[1] ** 0.5 <= 1.0 for a in one), "uniform within 1/sqrt(inputs)"
    model = tp_decoders.load(base)
    plain = _logits(model)
    attach(model, ALL)
    _close(_logits(model), plain)


@pytest.mark.parametrize(
    ("family", "targets", "ends"),
    [
        ("gpt2", None, {"attn.c_attn"}),
        ("gpt2", ("c_proj",), {"attn.c_proj", "mlp.c_proj"}),
        ("gpt2", ("mlp.c_proj", "qkv"), {"mlp.c_proj", "attn.c_attn"}),
        ("gpt_neox_japanese", ("out",), {"attention.dense"}),
        ("mpt", r".*ffn\.\w+", {"ffn.up_proj", "ffn.down_proj"}),
        ("mpt", ("lm_head",), {"lm_head"}),
        ("gpt_neox", ("all-linear",), {"query_key_value", "attention.dense", "dense_h_to_4h", "dense_4h_to_h"}),
    ],
)
def test_targets_are_chosen_as_peft_chooses_them(
    checkpoints: dict[str, Path], tmp_path: Path, family: str, targets: Any, ends: set[str]
) -> None:
    model = tp_decoders.load(checkpoints[family])
    chosen = {their_module(model, name) for name in targeted(model, targets)}
    assert {next((e for e in ends if name.endswith(e)), name) for name in chosen} == ends
    attach(model, LoraConfig(targets=targets))
    save_adapter(model, tmp_path / "adapter")
    config = peft.LoraConfig.from_pretrained(tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoints[family])
    named = {
        name for name, _ in base.named_modules() if peft.tuners.tuners_utils.check_target_module_exists(config, name)
    }
    assert named == chosen, f"target_modules {config.target_modules}"


def test_targets_that_name_nothing_are_refused(checkpoints: dict[str, Path]) -> None:
    model = tp_decoders.load(checkpoints["gpt2"])
    for targets in (("c_attn", "q_proj"), "q_proj", ("wte",)):
        with pytest.raises(ConfigError, match="name no linear layer; choose from attn.c_attn, attn.c_proj, lm_head"):
            attach(model, LoraConfig(targets=targets))
    attach(model, LoraConfig())
    with pytest.raises(ConfigError, match="has an adapter already"):
        attach(model, LoraConfig())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora True; not supported"),
        ({"bias": "all"}, "bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "changes the base model"),
        ({"peft_type": "IA3"}, "does not describe a LoRA adapter"),
        ({"r": 0}, "lora rank 0"),
        ({"r": 3}, r"blocks.0.qkv has .*\(4, 48\)"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(
    checkpoints: dict[str, Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    _peft_adapter("gpt2", tmp_path / "a", r=4, target_modules=["c_attn"])
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    model = tp_decoders.load(checkpoints["gpt2"])
    with pytest.raises(CheckpointError, match=message):
        load_adapter(model, tmp_path / "a")
    assert model.lora is None and not list(adapted(model))


def test_another_models_adapter_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    _peft_adapter("gpt_neox", tmp_path / "a", r=4, target_modules=["query_key_value"])
    with pytest.raises(CheckpointError, match="belongs to no linear layer of this model"):
        load_adapter(tp_decoders.load(checkpoints["gpt2"]), tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json cannot be read"):
        read_adapter_config(tmp_path)


def test_a_head_tied_to_the_embedding_is_not_merged(tmp_path: Path) -> None:
    model = tp_decoders.load(tiny.save_tiny("gpt_bigcode", tmp_path / "tied"))
    attach(model, LoraConfig(targets=("lm_head",)))
    with pytest.raises(ConfigError, match="the head's weight is the embedding's"):
        merge(model)
