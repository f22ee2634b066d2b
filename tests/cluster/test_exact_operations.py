"""On the native path torch does nothing to floating-point numbers but what IEEE 754 or plain copying fixes: no sum
whose order, no function whose last bit, is a vector library's. So the bits are the same on every machine, by
construction.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from tests.cluster.engine.tiny_models import CONFIGS
from tests.cluster.exact_models import exact_model, greedy, log_probs, training
from tests.native_kernels import kernels_or_skip

EXACT = "abs add add_ clamp div div_ floor mul mul_ minimum neg nextafter reciprocal round rsub sqrt sub sub_"
"""One operation of IEEE 754 (or its rounding to bfloat16) per element; torch's reciprocal is a division."""
CHOSEN = "amax aminmax eq ge gt isfinite le lt masked_fill_ ne searchsorted sort topk where"
"""Comparisons, and picks whose values no order of comparing changes."""
COPIED = """
    _local_scalar_dense _to_copy _unsafe_view alias cat clone copy_ detach detach_ embedding empty empty_like expand
    flatten full full_like gather index lift_fresh movedim new_empty new_zeros ones ones_like permute repeat_interleave
    resolve_conj resolve_neg scalar_tensor select select_backward slice slice_backward split split_with_sizes stack t to
    transpose unbind unflatten unsqueeze view zero_ zeros zeros_like
"""
"""Numbers that are made, moved, or rounded to another type."""
IN_TURN = "cumsum embedding_dense_backward"
"""Sums that torch takes one addend after another, in the order of memory, on every machine."""
ALLOWED = frozenset(" ".join((EXACT, CHOSEN, COPIED, IN_TURN)).split())
DTYPES = (torch.float32, torch.bfloat16)


class Inexact(TorchDispatchMode):
    """Notes every operation on floating-point numbers that is not allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        flat = [*tree_flatten((args, kwargs))[0], *tree_flatten(result)[0]]
        if name not in ALLOWED and any(isinstance(x, torch.Tensor) and x.is_floating_point() for x in flat):
            self.found.add(name)
        return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", CONFIGS)
def test_torch_does_nothing_inexact(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    kernels_or_skip()
    model = exact_model(family, tmp_path, dtype)
    with Inexact() as mode:
        log_probs(model)
        greedy(model, 4)
        greedy(model, 4, temperature=0.8)
        list(training(model, 2))
    assert not mode.found


def test_the_watch_sees_what_is_a_library_s_own() -> None:
    x = torch.ones(3, requires_grad=True)
    with Inexact() as mode:
        (x.exp().sum() + x.norm()).backward()
    assert {"exp", "sum", "linalg_vector_norm"} <= mode.found
