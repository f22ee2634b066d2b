"""An update that would not be finite is never written: on every layout, in every type, by either kernel."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from cluster.training.step import optimizer as module
from cluster.training.step.nonfinite_errors import BrokenUpdate
from cluster.training.step.optimizer import OptimizerConfig
from cluster.training.step.trainer import Trainer
from cluster.training.step.update_guard import Bounds, UpdateGuard
from parallel.errors import WorkerError
from parallel.native.adamw import Rates
from parallel.ranks.group import Group
from parallel.ranks.mesh import Groups, init_groups
from tests.cluster.engine.tiny_models import save_tiny
from tests.cluster.training.step.steps import Layout, advance, batch_of, digest, documents, make_trainer
from tests.ranks import free_address

FINE = OptimizerConfig(learning_rate=1e-3)
BROKEN = {
    "a rate beyond float32": {"learning_rate": 1e39},
    "a rate that leaves no weight finite": {"learning_rate": 3e38, "weight_decay": 1e3},
    "a decay that leaves no weight finite": {"weight_decay": 1e308},
    "no epsilon, and a gradient of zero": {"epsilon": 0.0},
    "an epsilon that float32 does not have": {"epsilon": 1e-60},
    "no epsilon, no memory of squares": {"epsilon": 0.0, "beta2": 0.0},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny("gpt2", tmp_path_factory.mktemp("gpt2")))


def state_of(trainer: Trainer) -> list[bytes]:
    """Every bit that an update may change on this rank."""
    optimizer = trainer.optimizer
    kept = [p.detach() for p in trainer.model.parameters()]
    kept += [flat.master for flat in optimizer.flats]
    kept += [moment for moments in optimizer._moments.values() for moment in moments.values()]
    return [tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in kept]


def failing(at: int, whole: Any = None) -> Any:
    """Calls the whole that often, then raises."""
    calls = itertools.count()

    def run(*arguments: Any, **named: Any) -> Any:
        if next(calls) == at:
            raise MemoryError("told to fail")
        return whole(*arguments, **named)

    return run


def refusals(group: Group, folder: str, layout: Layout, address: str, dtype: torch.dtype) -> Any:
    """One rank: two steps, every broken update in between, and whether a clean run gives the same bits."""
    if layout.dp > 1:
        groups = init_groups(group.rank, group.size, layout.tp, layout.dp, address)
    else:
        groups = Groups(group, Group.single())
    clean, tried = (make_trainer(layout, groups, folder, dtype) for _ in range(2))
    list(advance(clean, groups, 2))
    list(advance(tried, groups, 1))
    before, words = state_of(tried), []
    for options in BROKEN.values():
        tried.forward_backward(batch_of([torch.arange(1, 6)], 4.0))  # a word of which most rows get no gradient
        with pytest.raises(BrokenUpdate) as refused:
            tried.optim_step(config=replace(FINE, **options))
        words.append(str(refused.value))
        assert state_of(tried) == before and tried.step == 1 and tried.weight_version == 1
        assert not any(flat.waiting for flat in tried.optimizer.flats)
    list(advance(tried, groups, 1))
    assert state_of(tried) == state_of(clean) and digest(tried, groups) == digest(clean, groups)
    return words


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(dp=2)], ids=lambda layout: layout.name)
def test_a_broken_update_changes_nothing_on_any_rank_and_is_named_alike(
    ranks: Any, folder: str, layout: Layout, dtype: torch.dtype
) -> None:
    words = ranks(layout.tp * layout.dp, refusals, folder, layout, free_address(), dtype)
    assert all(found == words[0] for found in words)
    assert all("the update would leave the" in found and "not finite" in found for found in words[0])


def test_the_kernel_of_torch_refuses_the_same(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_native", lambda master: False)
    refusals(Group.single(), folder, Layout(), "", torch.float32)


def test_torchs_kernel_in_runs_leaves_the_gradient_as_it_is_and_gives_the_native_ones_update(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes a scaled copy: after an error the gradients that waited wait again, unclipped."""
    clipped = replace(FINE, max_grad_norm=1e-3)
    native, other = (
        make_trainer(Layout(), Groups(Group.single(), Group.single()), folder, torch.float32) for _ in range(2)
    )
    for trainer in (native, other):
        trainer.forward_backward(batch_of(documents(0), 4.0))
    monkeypatch.setattr(module, "PIECE", 1 << 10)
    native.optim_step(config=clipped)
    monkeypatch.setattr(module, "_native", lambda master: False)
    before = [flat.grad.clone() for flat in other.optimizer.flats]
    names = other.optimizer.keep(values=False)
    with monkeypatch.context() as patch:
        patch.setattr(module.adamw, "adamw", failing(0))
        with pytest.raises(MemoryError):
            other.optim_step(config=clipped)
    other.optimizer.put_back(names)
    assert all(torch.equal(flat.grad, grad) for flat, grad in zip(other.optimizer.flats, before, strict=True))
    other.optim_step(config=clipped)
    for one, same in zip(native.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(one, same, rtol=1e-6, atol=1e-8)


def test_a_weight_that_has_no_place_in_its_own_type_is_refused(folder: str) -> None:
    trainer = make_trainer(Layout(), Groups(Group.single(), Group.single()), folder, torch.bfloat16)
    trainer.forward_backward(batch_of(documents(0), 4.0))
    guard = trainer.optimizer._guard
    trainer.optim_step(config=FINE)
    name, parameter = next(iter(trainer.model.named_parameters()))
    flat = next(flat for flat in trainer.optimizer.flats if name in flat.parameters)
    flat.view(flat.master, name).fill_(3.4e38)  # of float32, not of bfloat16
    guard.forget()
    trainer.forward_backward(batch_of(documents(0), 4.0))
    with pytest.raises(BrokenUpdate, match=f"the weight of {name} not finite"):
        trainer.optim_step(config=FINE)
    assert torch.isfinite(parameter).all()


def test_a_usual_step_reads_nothing_for_the_check(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(Layout(), Groups(Group.single(), Group.single()), folder, torch.float32)
    list(advance(trainer, trainer.groups, 1))

    def never(*arguments: Any) -> Any:
        raise AssertionError("the check looked at numbers")

    monkeypatch.setattr(UpdateGuard, "_measured", never)
    monkeypatch.setattr(UpdateGuard, "_tried", never)
    list(advance(trainer, trainer.groups, 20))


def test_bounds_hold_whatever_the_numbers_are() -> None:
    """Against the kernel itself, with gradients, moments and rates of all sizes."""
    generator = torch.Generator().manual_seed(5)
    proven = 0
    sizes = (1e-30, 1e-3, 1.0, 1e8, 1e17)
    rates_tried = (0.0, 1e-4, 1e6, 1e30)
    for size, rate, epsilon, decay in itertools.product(sizes, rates_tried, (1e-36, 1e-8, 1e20), (0.0, 10.0)):
        rates = Rates(step=3, learning_rate=rate, beta1=0.9, beta2=0.95, epsilon=epsilon, weight_decay=decay, scale=0.5)
        master, grad, first, second = ((torch.rand(256, generator=generator) * 2 - 1) * size for _ in range(4))
        second = second.abs().clamp(max=1e36)
        now = Bounds(*(float(values.abs().max()) for values in (master, first, second)))
        bound = now.after(rates, float(grad.abs().max()))
        module._update_one(master, grad, first, second, rates)
        found = [float(values.abs().max()) for values in (master, first, second)]
        if bound.master <= 1e37:
            proven += 1
            assert all(a <= b for a, b in zip(found, (bound.master, bound.first, bound.second), strict=True))
    assert proven > 60


def test_what_fails_before_the_first_number_is_written_is_the_calls_own_and_half_an_update_is_not(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(Layout(), Groups(Group.single(), Group.single()), folder, torch.float32)
    list(advance(trainer, trainer.groups, 1))
    before, whole = state_of(trainer), module._update_one
    monkeypatch.setattr(module, "_update_one", failing(0))
    trainer.forward_backward(batch_of(documents(1), 4.0))
    with pytest.raises(MemoryError):
        trainer.optim_step()
    assert state_of(trainer) == before
    monkeypatch.setattr(module, "_update_one", failing(1, whole))
    with pytest.raises(WorkerError, match="half-way"):
        trainer.optim_step()


def test_a_weight_that_is_not_finite_already_stays_so_and_is_no_reason_to_refuse(folder: str) -> None:
    trainer = make_trainer(Layout(), Groups(Group.single(), Group.single()), folder, torch.float32)
    trainer.forward_backward(batch_of(documents(0), 4.0))
    next(iter(trainer.model.parameters())).data.view(-1)[3] = float("nan")
    trainer.optim_step()
    trainer.forward_backward(batch_of([torch.arange(60, 70)], 4.0))
    with pytest.raises(BrokenUpdate):
        trainer.optim_step(config=replace(FINE, learning_rate=1e39))
    assert sum(int((~p.isfinite()).sum()) for p in trainer.model.parameters()) == 1
