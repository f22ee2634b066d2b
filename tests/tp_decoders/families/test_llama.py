"""What only the family llama has: windows, heads of any size, who answers for a shared head, tasks, tokenizers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, normalizers
from torch import Tensor

from parallel.attention.forward_pass import Pass
from parallel.errors import ConfigError
from parallel.layers.grad_norm import squared_norm
from parallel.matmul import activation
from parallel.ranks.group import Group
from parallel.sharding.rules import rule_of
from parallel.vocabulary.cross_entropy import vocab_cross_entropy
from tests.tp_decoders.families.parity import CASES, LLAMA, hf, write_reference
from tp_decoders import load, save
from tp_decoders.checkpoint.slice_writer import owned_pieces
from tp_decoders.registry import config_from_hf
from tp_decoders.tasks.task_outputs import task_outputs
from tp_decoders.text.tokenizer import load_tokenizer


def test_a_window_that_leaves_nothing_out_is_read_and_a_shorter_one_is_refused(tmp_path: Path) -> None:
    """The same weights with a window of the whole context give transformers' own logits of a model with one."""
    hf("Mistral", LLAMA, sliding_window=32)().save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ids = torch.arange(32) % 31
    with torch.no_grad():
        ours, theirs = load(tmp_path)(ids, Pass.packed([32])), model(ids[None]).logits[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        model.config.sliding_window = 31
        assert not torch.allclose(model(ids[None]).logits[0][31], theirs[31], atol=1e-4), "else any would do"
    short = {**LLAMA, "model_type": "mistral", "sliding_window": 31}
    with pytest.raises(ConfigError, match="sequences of at most 31 the window leaves nothing out: give max_position"):
        config_from_hf(short)
    assert config_from_hf({**short, "max_position_embeddings": 31}).max_positions == 31
    scaled = {**LLAMA, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 32, "max_window_layers": 0}
    assert config_from_hf(scaled).max_positions == 32
    with pytest.raises(ConfigError, match="for a context of 64"):
        config_from_hf({**scaled, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}})


def gradient_norm(group: Group, folder: str) -> tuple[float, list[tuple[str, Any]]]:
    """The norm of the whole gradient, and which elements of k this rank writes to a file."""
    reference = torch.load(Path(folder) / "reference.pt")
    model = load(folder, group=group)
    logits = model(reference["tokens"], Pass.packed((7, 1, 5)))
    vocab_cross_entropy(logits, reference["targets"], model.head.shards, group).backward()
    parameters = list(model.parameters())
    written = [
        (name, index)
        for name, parameter in model.named_parameters()
        for index, _ in owned_pieces(parameter, parameter.detach(), group.rank)
    ]
    return squared_norm(parameters, [p.grad.float() for p in parameters if p.grad is not None], group), written


@pytest.mark.parametrize("case", ["qwen3", "llama 3 of 6 heads", "llama multi-query"])
def test_a_shared_head_counts_once_in_norms_and_files(
    case: str, ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    write_reference(case, tmp_path)
    reference = torch.load(tmp_path / "reference.pt")
    wanted = sum(float(grad.square().sum()) for grad in reference["grads"].values())
    shapes = {name: parameter.shape for name, parameter in load(tmp_path).named_parameters()}
    norms: set[float] = set()
    for size in (1, 2, 3, 4):
        results = ranks(size, gradient_norm, str(tmp_path))
        norms.update(norm for norm, _ in results)
        counts = {name: torch.zeros(shape) for name, shape in shapes.items()}
        for _, written in results:
            for name, index in written:
                counts[name][index] += 1
        assert all(bool((count == 1).all()) for count in counts.values()), f"tp {size}"
    assert len(norms) == 1 and norms.pop() == pytest.approx(wanted, rel=1e-5)


def test_heads_of_their_own_size_and_a_bias_only_where_the_type_has_one() -> None:
    base = {**LLAMA, "head_dim": 10}
    assert config_from_hf({**base, "model_type": "llama"}).head_dim == 10
    assert config_from_hf({**base, "model_type": "qwen3", "head_dim": None}).head_dim == 4
    assert config_from_hf({**LLAMA, "model_type": "qwen3"}).head_dim == 128
    options = {kind: config_from_hf({**LLAMA, "model_type": kind}).options for kind in ("llama", "qwen2", "qwen3")}
    assert [(o.qkv_bias, o.out_bias, o.mlp_bias, o.qk_norm) for o in options.values()] == [
        (False, False, False, False), (True, False, False, False), (False, False, False, True),
    ]  # fmt: skip
    biased = config_from_hf({**LLAMA, "model_type": "llama", "attention_bias": True, "mlp_bias": True}).options
    assert biased.qkv_bias and biased.out_bias and biased.mlp_bias


def test_a_qwen2_that_classifies_equals_transformers_and_one_of_spans_is_refused(tmp_path: Path) -> None:
    config = transformers.Qwen2Config(**LLAMA, num_labels=3, pad_token_id=0)
    model = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(tmp_path / "made")
    ids = torch.arange(1, 12)
    with torch.no_grad():
        theirs = model(ids[None]).logits
        ours = load(tmp_path / "made", task="sequence-classification")
        got = task_outputs(ours, ids, Pass.packed([11])).logits
    torch.testing.assert_close(got, theirs, rtol=1e-4, atol=1e-5)
    save(ours, tmp_path / "saved")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert type(again) is type(model) and torch.equal(again.score.weight, model.score.weight)
    with pytest.raises(ConfigError, match="of a qwen2 is not supported, only of gpt2, "):
        load(tmp_path / "made", task="question-answering")


def gated_by(name: str, values: Tensor, grad: Tensor) -> list[Tensor]:
    gate, up = (x.clone().requires_grad_() for x in values)
    y = activation.gated(gate, up, name)
    y.backward(grad)
    return [y.detach(), gate.grad, up.grad]  # type: ignore[list-item]


def test_a_gate_is_the_same_with_kernels_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    values, grad = torch.randn(2, 5, 19), torch.randn(5, 19)
    native = gated_by("silu", values, grad)
    monkeypatch.setattr(activation, "is_native", lambda x, name: False)
    for a, b in zip(native, gated_by("silu", values, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_llama_tokenizer_of_words_and_bytes_gives_every_text_back(tmp_path: Path) -> None:
    """As Llama 2 and Mistral have it: spaces as U+2581, unknown characters as bytes."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581a"]
    vocab = {token: i for i, token in enumerate(tokens)}
    bpe = models.BPE(vocab, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = HFTokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    theirs = transformers.LlamaTokenizerFast(tokenizer_object=tokenizer, legacy=False)
    theirs.save_pretrained(tmp_path)
    hf("Llama", LLAMA, vocab_size=len(tokens))().config.save_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    assert ours is not None
    for text in ("a b", "a a\u00e9", "b \U0001f600 a"):
        ids = ours.encode(text)
        assert ids == theirs(text).input_ids
        assert ours.decode(ids).strip() == text == theirs.decode(ids, skip_special_tokens=True)


def test_the_shards_of_all_sizes_join_to_the_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    CASES["qwen3 3 of 12 heads"]().save_pretrained(tmp_path)
    whole = dict(load(tmp_path).named_parameters())
    for size in (2, 3, 7, 16):
        shards = [dict(load(tmp_path, group=Group(rank, size)).named_parameters()) for rank in range(size)]
        for name, parameter in whole.items():
            assert torch.equal(rule_of(shards[0][name]).join([own[name].detach() for own in shards]), parameter), name
