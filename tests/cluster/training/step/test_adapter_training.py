"""Training adapters: against transformers, PEFT and torch; one set of bits at every layout; saved and resumed."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import tests.cluster.engine.tiny_models as tiny
import tests.cluster.training.step.steps as steps
import tp_decoders
from cluster.training.checkpoint.checkpointer import Checkpointer, latest_checkpoint, restore_optimizer, verify
from cluster.training.step.trainer import Trainer, TrainerConfig
from parallel.attention.forward_pass import Pass
from parallel.ranks.group import Group
from parallel.ranks.mesh import Groups, init_groups
from tests.ranks import free_address
from tp_decoders.adapters.lora import attach
from tp_decoders.adapters.peft_files import adapter_tensors, load_adapter, save_adapter
from tp_decoders.checkpoint.load_save import full_tensor
from tp_decoders.model.adapted_layers import is_adapter
from tp_decoders.model.lora_config import LoraConfig

# importing transformers' GPT-BigCode warns
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

FAMILIES = sorted(tiny.CONFIGS)
CONFIG = LoraConfig(rank=4, alpha=8.0, targets="all-linear")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {family: tiny.save_tiny(family, root / family) for family in FAMILIES}


def _meet(group: Group, layout: Any, address: str) -> Groups:
    groups = (
        init_groups(group.rank, group.size, layout.tp, layout.dp, address)
        if layout.dp > 1
        else Groups(group, Group.single())
    )
    return replace(groups, tp=replace(groups.tp, sequence_parallel=layout.sequence_parallel))


def _trainer(groups: Groups, layout: Any, base: str, adapter: Path | None, dtype: torch.dtype) -> Trainer:
    """Goes on with an adapter where there is one, else begins one."""
    model = tp_decoders.load(base, group=groups.tp, dtype=dtype)
    if adapter is None:
        attach(model, replace(CONFIG, dropout=0.2) if layout.dropout else CONFIG, seed=1)
    else:
        load_adapter(model, adapter, trainable=True)
    config = TrainerConfig(
        optimizer=steps.OPTIMIZER, recompute=layout.recompute, micro_batch_tokens=layout.micro_batch_tokens
    )
    return Trainer(model, groups, config)


def _digest(model: Any, group: Group, of_adapters: bool) -> str | None:
    whole = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        full = full_tensor(parameter, group) if is_adapter(name) == of_adapters else None
        if full is not None:
            whole.update(full.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest() if group.rank == 0 else None


def _run(
    group: Group, base: str, layout: Any, num_steps: int, address: str, out: str | None, dtype: torch.dtype
) -> Any:
    """(losses and norms of this dp rank, digest of the adapter, whether the base is as it was)."""
    groups = _meet(group, layout, address)
    trainer = _trainer(groups, layout, base, None, dtype)
    before = _digest(trainer.model, groups.tp, of_adapters=False)
    history = list(steps.advance(trainer, groups, num_steps, layout.dropout))
    if out is not None and groups.dp.rank == 0:
        save_adapter(trainer.model, out)
    untouched = _digest(trainer.model, groups.tp, of_adapters=False) == before
    return history, _digest(trainer.model, groups.tp, of_adapters=True), untouched


@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_steps_equal_transformers_with_peft_and_torch(
    ranks: Any, checkpoints: dict[str, Path], tmp_path: Path, family: str
) -> None:
    start = tp_decoders.load(checkpoints[family])
    attach(start, CONFIG, seed=1)
    save_adapter(start, tmp_path / "start")
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoints[family], attn_implementation="eager").eval()
    model = peft.PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True)
    before = {name: tensor.clone() for name, tensor in peft.get_peft_model_state_dict(model).items()}
    losses, norms = steps.reference(model, 20)
    wanted = peft.get_peft_model_state_dict(model)
    layouts = [steps.Layout(), steps.Layout(tp=2, sequence_parallel=True, recompute="full")]
    if family == "gpt_bigcode":
        layouts += [steps.Layout(tp=3, micro_batch_tokens=10), steps.Layout(tp=2, dp=2)]
    for layout in layouts:
        out, size = tmp_path / layout.name, layout.tp * layout.dp
        results = ranks(size, _run, str(checkpoints[family]), layout, 20, free_address(), str(out), torch.float32)
        per_dp = [results[d * layout.tp][0] for d in range(layout.dp)]
        ours = [sum(history[i][0] for history in per_dp) for i in range(20)]
        assert ours == pytest.approx(losses, rel=1e-4), layout.name
        assert [norm for _, norm in results[0][0]] == pytest.approx(norms, rel=2e-4), layout.name
        trained = peft.utils.load_peft_weights(str(out))
        for name, tensor in wanted.items():
            error = float((trained[name] - tensor).norm() / tensor.norm())
            assert error < 1e-4, f"{layout.name}: {name} is off by {error:.1e}"
            assert float((before[name] - tensor).norm()) > 1e-3, f"{name} was not trained"


@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, torch.float32) for family in FAMILIES), ("gpt_bigcode", torch.bfloat16)]
)
def test_trained_adapters_have_the_same_bits_at_every_layout_and_the_base_is_untouched(
    ranks: Any, checkpoints: dict[str, Path], family: str, dtype: torch.dtype
) -> None:
    layouts = [
        steps.Layout(),
        steps.Layout(tp=2, sequence_parallel=True, recompute="selective"),
        steps.Layout(tp=3, recompute="full"),
        steps.Layout(tp=4, sequence_parallel=True, recompute="full"),
    ]
    digests = {}
    for layout in layouts:
        results = ranks(layout.tp, _run, str(checkpoints[family]), layout, 8, "", None, dtype)
        digests[layout.name] = (results[0][1], results[0][0][-1])
        assert all(untouched for _, _, untouched in results)
    assert len(set(digests.values())) == 1, digests


def test_dropout_of_the_branches_has_one_mask_at_every_layout(ranks: Any, checkpoints: dict[str, Path]) -> None:
    layouts = [
        steps.Layout(dropout=True),
        steps.Layout(dropout=True, tp=2, sequence_parallel=True, recompute="full"),
        steps.Layout(dropout=True, tp=3, recompute="selective"),
        steps.Layout(),
    ]
    base = str(checkpoints["gpt_neox"])  # whose config drops nothing
    found = [ranks(layout.tp, _run, base, layout, 4, "", None, torch.float32)[0] for layout in layouts]
    digests = [digest for _, digest, _ in found]
    assert digests[0] == digests[1] == digests[2] != digests[3]


def _saving(
    group: Group, base: str, root: str, layout: Any, until: int, address: str, dtype: torch.dtype
) -> str | None:
    """Trains to step `until` from the newest checkpoint under root, or from the start; saves there."""
    groups = _meet(group, layout, address)
    newest = latest_checkpoint(Path(root))
    trainer = _trainer(groups, layout, base, newest, dtype)
    if newest is not None:
        restore_optimizer(newest, trainer.model, trainer.optimizer, groups)
    for _ in steps.advance(trainer, groups, until - trainer.step):
        pass
    checkpointer = Checkpointer(Path(root), groups, keep=2)
    checkpointer.save(trainer.model, trainer.optimizer, {})
    checkpointer.wait()
    return _digest(trainer.model, groups.tp, of_adapters=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stop_and_resume_of_an_adapter_ends_with_the_undisturbed_bits(
    ranks: Any, checkpoints: dict[str, Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    base = str(checkpoints["gpt_bigcode"])

    def go(root: str, until: int, **layout: Any) -> Any:
        made = steps.Layout(**layout)
        return ranks(made.tp * made.dp, _saving, base, str(tmp_path / root), made, until, free_address(), dtype)[0]

    whole = go("whole", 4, tp=2)
    for name, then in {"same": {"tp": 2}, "other": {"tp": 3}}.items():
        go(name, 2, tp=2)
        assert go(name, 4, **then) == whole, f"{name}: moments or masters were lost"


def test_a_checkpoint_of_an_adapter_is_a_peft_adapter_and_holds_no_base(
    ranks: Any, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    base = checkpoints["gpt2"]
    ranks(3, _saving, str(base), str(tmp_path), steps.Layout(tp=3), 2, "", torch.float32)
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    verify(newest)
    assert [path.name for path in newest.glob("*.safetensors")] == ["adapter_model.safetensors"]
    assert not (newest / "config.json").exists()
    ours = tp_decoders.load(base)
    load_adapter(ours, newest)
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), newest).eval()
    ids = torch.arange(12) % steps.VOCAB
    with torch.no_grad():
        got, wanted = ours(ids, Pass.packed([12])), theirs(ids[None]).logits[0]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert len(adapter_tensors(ours)) == 16
