"""A program computes what the recorded calls did, from what stands in their operands now; nothing runs unseen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from parallel.native import elementwise, step_kernels
from parallel.native.compiled import library
from parallel.native.operands import Status
from parallel.replay.module_state import ModuleState
from parallel.replay.recorder import LOWERED, Recorder
from parallel.sharding.rules import Replicated, sharded

INDEX = torch.tensor([2, 0, 1])
ADAPTED: dict[str, Callable[[Tensor], Tensor]] = {
    "a sum": lambda x: x + x,
    "a sum with a number": lambda x: x + 0.0,
    "a product with a number": lambda x: x * 0.3,
    "a clamp": lambda x: x.clamp(-0.5, 0.5),
    "a clamp from below": lambda x: x.clamp(min=0.1),
    "rows": lambda x: x[INDEX],
    "an embedding": lambda x: nn.functional.embedding(INDEX, x),
    "rows several times": lambda x: x.repeat_interleave(3, 0),
    "a copy of other strides": lambda x: x.unflatten(1, (2, 4)).transpose(0, 1).flatten(1),
    "another type": lambda x: (x + 0.0).to(torch.bfloat16 if x.dtype is torch.float32 else torch.float32),
    "views only, then a kernel": lambda x: elementwise.activate(x.unflatten(1, (2, 4)).unbind(1)[1], "gelu"),
    "a gate": lambda x: elementwise.gate(x[:, :4], x[:, 4:], "silu"),
    "an RMS norm": lambda x: elementwise.rms_norm(x, x[0], 1e-5),
    "a layer norm": lambda x: elementwise.layer_norm(x, x[0], None, 1e-5),
}
REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "a function of torch": lambda x: (x + x).sin(),
    "a product of tensors": lambda x: x * x,
    "a value that Python sees": lambda x: x + float(x[0, 0]),
    "a write": lambda x: (x + 0.0).mul_(2.0),
    "a sum over other shapes": lambda x: x + x[0],
    "a kernel that is called in another way": lambda x: elementwise.exp(x.float()),
    "a new constant": lambda x: x + torch.ones_like(x),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", ADAPTED)
@torch.inference_mode()
def test_a_program_follows_what_its_operands_hold(what: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 8).to(dtype)
    with Recorder() as recorder:
        y = ADAPTED[what](x)
    assert torch.equal(y, ADAPTED[what](x))
    program = recorder.program(x, y)
    assert program is not None, recorder.refusal
    for _ in range(3):
        x.copy_(torch.randn(3, 8))
        assert program.replay() == Status.OK
        assert torch.equal(y, ADAPTED[what](x))


@pytest.mark.parametrize("what", REFUSED)
@torch.inference_mode()
def test_what_no_program_can_hold_is_computed_and_said(what: str) -> None:
    x = torch.randn(3, 8)
    with Recorder() as recorder:
        y = REFUSED[what](x)
    assert torch.equal(y, REFUSED[what](x))
    assert recorder.program(x, y) is None and recorder.refusal


@torch.inference_mode()
def test_the_first_failure_ends_a_replay() -> None:
    x, index = torch.randn(3, 8), INDEX.clone()
    with Recorder() as recorder:
        rows = x[index]
        y = rows + rows
    program = recorder.program()
    assert program is not None and program.names == ("step_gather", "step_map")
    before = y.clone()
    index[1] = 3
    assert program.replay() == Status.BAD_INDEX
    assert torch.equal(y, before), "what comes after was not computed"


@torch.inference_mode()
def test_recording_ends_with_its_block_also_by_an_error() -> None:
    with pytest.raises(RuntimeError, match="here"), Recorder():
        raise RuntimeError("here")
    assert library.record(None) is None
    with Recorder() as recorder:
        x = torch.empty(1, 8)
    step_kernels.added(x, x)
    assert recorder.program() is None, "nothing was recorded"


def test_only_operations_whose_bits_are_known_are_made_kernels() -> None:
    assert len(LOWERED) == 7, "each has a row in the table above"


def test_a_module_is_known_by_its_parts_and_their_writes() -> None:
    module = nn.Module()
    module.weight = sharded((3, 4), Replicated(), 0, torch.float32, None)
    module.gain = sharded((3,), Replicated(), 0, torch.float32, None)
    state = ModuleState(module)
    assert state.countable and state.holds()
    with torch.no_grad():
        module.gain.add_(1.0)
    assert state.holds(), "kernels read it where it lies"
    with torch.no_grad():
        module.weight.add_(1.0)
    assert not state.holds()
    state = ModuleState(module)
    module.extra = nn.Module()
    assert not state.holds()
    state = ModuleState(module)
    module.extra = None  # type: ignore[assignment]
    assert not state.holds()
    module.weight = nn.Parameter(torch.ones(3, 4))
    assert not ModuleState(module).countable, "nobody counts the writes to it"
