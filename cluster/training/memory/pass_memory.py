"""What a forward and backward over one micro-batch takes, and which collectives it issues.

The model's own code runs on the meta device with one layer and with two, so that what autograd keeps, what blocks
recompute and what the loss holds are those of the real thing, whatever the family; further layers cost what the
second one did. Attention is the kernels' (kernel_shapes.py), peers are imagined (fake_comm.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental import _config as symbolic

from cluster.training.memory.fake_comm import FakeComm
from cluster.training.memory.kernel_shapes import ShapeAttend
from cluster.training.memory.lasting_memory import packed_size
from cluster.training.memory.live_tensors import LiveBytes
from parallel.attention.forward_pass import Pass
from parallel.layers import norm
from parallel.layers.rotary import rotate_
from parallel.matmul import activation
from parallel.matmul.grad_sum import ATTRIBUTE
from parallel.native.memory import KEPT_SCRATCH, LINE
from parallel.native.packed_weight import UNIT, units_of
from parallel.options import Recompute
from parallel.ranks.group import Group, Numerics
from parallel.vocabulary import logsumexp
from parallel.vocabulary.cross_entropy import vocab_token_losses
from tp_decoders.checkpoint.load_save import build
from tp_decoders.model.config import DecoderConfig
from tp_decoders.model.decoder import Decoder

NATIVE_PIECES = (
    norm.torch_grads, norm.torch_rms_norm, activation.gate_values, activation.torch_gate_grad, logsumexp.softmax_grad,
    logsumexp.exp_sum_leaves, rotate_,
)  # fmt: skip
"""What the CPU kernels compute without temporaries, and torch with several."""
Prepare = Callable[[Decoder], None]
"""What is done to a model before it is trained (adapters put on it, its own weights frozen)."""


@dataclass(frozen=True)
class Collectives:
    """How many of each kind a rank issues, and how many bytes it gives to them."""

    counts: Counter[str]
    nbytes: Counter[str]

    @staticmethod
    def none() -> Collectives:
        return Collectives(Counter(), Counter())

    def times(self, factor: int) -> Collectives:
        return Collectives(
            Counter({kind: factor * n for kind, n in self.counts.items()}),
            Counter({kind: factor * n for kind, n in self.nbytes.items()}),
        )

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def total_bytes(self) -> int:
        return sum(self.nbytes.values())


@dataclass(frozen=True)
class PassCost:
    """Bytes held at the end of the forward, at the worst moment of both passes, and what goes between ranks."""

    kept: int
    peak: int
    collectives: Collectives


@dataclass(frozen=True, kw_only=True)
class PassShape:
    """One rank's micro-batch: where it runs, in which type, over how many tokens."""

    rank: int = 0
    tp: int = 1
    tokens: int
    dtype: torch.dtype
    device: str
    recompute: Recompute = "none"
    sequence_parallel: bool = False
    numerics: Numerics = "invariant"

    def group(self) -> Group:
        comm = FakeComm(self.rank, self.tp, "torch" if self.device == "cuda" else "shm") if self.tp > 1 else None
        return Group(self.rank, self.tp, comm, self.numerics, self.sequence_parallel)


def pass_cost(config: DecoderConfig, shape: PassShape, prepare: Prepare | None = None) -> PassCost:
    """Of the whole depth. On CPUs the native kernels add leaves inside a product: there its temporaries are those of
    one plain product, and only the collectives are the invariant ones.
    """
    cost = _deep(config, shape, prepare)
    if shape.device == "cpu" and shape.numerics == "invariant":
        lean = _deep(config, replace(shape, numerics="fast"), prepare)
        cost = PassCost(lean.kept, lean.peak, cost.collectives)
    return cost


def _deep(config: DecoderConfig, shape: PassShape, prepare: Prepare | None) -> PassCost:
    first = run_pass(replace(config, n_layers=1), shape, prepare)
    if config.n_layers == 1:
        return first
    second = run_pass(replace(config, n_layers=2), shape, prepare)
    more, step = config.n_layers - 2, second.kept - first.kept
    counts = Counter({k: n + more * (n - first.collectives.counts[k]) for k, n in second.collectives.counts.items()})
    nbytes = Counter({k: n + more * (n - first.collectives.nbytes[k]) for k, n in second.collectives.nbytes.items()})
    return PassCost(second.kept + more * step, second.peak + more * step, Collectives(counts, nbytes))


def run_pass(config: DecoderConfig, shape: PassShape, prepare: Prepare | None = None) -> PassCost:
    """The cost of exactly this model, found by running it as shapes."""
    group = shape.group()
    model = build(config, group, shape.dtype, "meta")
    if prepare is not None:
        prepare(model)
    model.recompute = shape.recompute
    trained = [p for p in model.parameters() if p.requires_grad]
    handles = [p.register_post_accumulate_grad_hook(_forget) for p in trained]
    tokens_T = torch.empty(shape.tokens, dtype=torch.int64, device="meta")
    products = _NativeProducts() if shape.device == "cpu" else None
    live = LiveBytes([*model.parameters(), tokens_T], products, NATIVE_PIECES if shape.device == "cpu" else ())
    if products is not None:
        for parameter in trained:
            setattr(parameter, ATTRIBUTE, _SumOnPaper(live, products))
    now = _shape_pass(tokens_T, shape)
    with symbolic.patch(meta_nonzero_assume_all_nonzero=True), live:  # type: ignore[attr-defined]
        loss = _loss(model, tokens_T, now, group)
        kept = live.now
        loss.backward()
    for handle in handles:
        handle.remove()
    comm = group.comm
    moved = Collectives(comm.counts, comm.byte_counts) if comm is not None else Collectives.none()
    return PassCost(kept, live.most + (products.lasting if products is not None else 0), moved)


def _shape_pass(tokens_T: Tensor, shape: PassShape) -> Pass:
    """One sequence; the tokens stand for its positions."""
    return Pass(positions_T=tokens_T, lengths=(shape.tokens,), attend=ShapeAttend(shape.device))


def _loss(model: Decoder, tokens_T: Tensor, now: Pass, group: Group) -> Tensor:
    """Of every token; of a task's head alone where the model has no vocabulary."""
    if model.has_vocabulary:
        return vocab_token_losses(model(tokens_T, now), tokens_T, model.head.shards, group).sum()
    assert model.task_head is not None, "a model without a vocabulary has a task"
    loss: Tensor = model.task_head(model.final(model.hidden(tokens_T, now))).float().sum()
    return loss


class _NativeProducts:
    """What the CPU kernels hold beside a result: the gradient of a weight, grad^T x, packs x and lays grad^T out by
    rows, both in places that are kept for the next time unless they are large (native/memory.py, native/src/gemm.cpp).
    """

    def __init__(self) -> None:
        self._kept = {"rows": 0, "packed": 0}

    @property
    def lasting(self) -> int:
        return sum(self._kept.values())

    def __call__(self, operator: Any, arguments: Sequence[Any]) -> int:
        if operator is not torch.ops.aten.mm.default or arguments[0].is_contiguous():
            return 0
        return self.scratch(*arguments)

    def scratch(self, grad_NT: Tensor, x_TK: Tensor) -> int:
        """Bytes that are taken anew and given back."""
        needed = {
            "rows": grad_NT.shape[0] * (-(-units_of(grad_NT.shape[1], grad_NT.dtype) * UNIT // LINE) | 1) * LINE,
            "packed": packed_size(x_TK.shape[1], x_TK.shape[0], (), x_TK.dtype),
        }
        for name, nbytes in needed.items():
            if nbytes <= KEPT_SCRATCH:
                self._kept[name] = max(self._kept[name], nbytes)
        return sum(nbytes for nbytes in needed.values() if nbytes > KEPT_SCRATCH)


class _SumOnPaper:
    """An optimiser's sum: the kernel writes a gradient into it, and nothing else is made."""

    def __init__(self, live: LiveBytes, products: _NativeProducts) -> None:
        self._live, self._products = live, products

    def add_product(self, grad_TN: Tensor, x_TK: Tensor) -> bool:
        self._live.hold(self._products.scratch(grad_TN.t(), x_TK))
        return True


def forward_peak(config: DecoderConfig, shape: PassShape, rows: int) -> int:
    """Bytes held at the worst moment of a forward that keeps nothing and wants the logits of `rows` tokens."""
    group = replace(shape, numerics="fast").group() if shape.device == "cpu" else shape.group()
    model = build(replace(config, n_layers=1), group, shape.dtype, "meta")
    tokens_T = torch.empty(shape.tokens, dtype=torch.int64, device="meta")
    live = LiveBytes([*model.parameters(), tokens_T])
    with torch.no_grad(), live:
        model(tokens_T, _shape_pass(tokens_T, shape), tokens_T[:rows])
    return live.most


def _forget(parameter: Tensor) -> None:
    """The optimiser adds a gradient to its own buffer as soon as it is complete."""
    parameter.grad = None
