"""AdamW over one rank's shards: float32 masters in flat buffers, state divided over data-parallel ranks (ZeRO-1),
clipped as one model.

    gradients --kernel, or hook--> flat float32 sums --dp sum--> clip --> AdamW on this dp rank's slice -->
    masters gathered over dp --> parameters

Parameters with two axes or more decay, the others do not (Loshchilov and Hutter, arXiv 1711.05101; Brown et al.
2020, appendix B). A float32 parameter IS its master: its storage is moved into the flat buffer. Buffers are padded
so that every element goes through the same vector code, wherever a layout puts it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import adamw

from cluster.training.step.flat_buffers import PIECE, FlatBuffers
from cluster.training.step.gradient_accumulation import accumulating
from cluster.training.step.nonfinite_errors import NonFinite
from cluster.training.step.update_guard import UpdateGuard
from parallel.errors import ConfigError, WorkerError
from parallel.layers.grad_norm import squared_norm
from parallel.matmul.grad_sum import ATTRIBUTE
from parallel.native.adamw import Rates, update
from parallel.native.compiled import library
from parallel.ranks.group import Group
from parallel.sharding.parameter import written
from parallel.sharding.released_weight import is_released

MOMENTS = ("exp_avg", "exp_avg_sq")
BELOW_ONE = 1.0 - 2.0**-25
"""From here on a number is 1 in float32: a moment of such a beta never learns."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW's constants, and the norm to which gradients are clipped (None: not at all)."""

    learning_rate: float = 1e-4  # in a job: schedule.learning_rate
    beta1: float = 0.9  # of the first moment
    beta2: float = 0.95  # of the second moment
    epsilon: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.1  # decoupled; not of biases and norms
    max_grad_norm: float | None = 1.0  # null: not clipped

    def __post_init__(self) -> None:
        for name, low, high in (
            ("learning_rate", 0.0, math.inf),
            ("weight_decay", 0.0, math.inf),
            ("epsilon", 0.0, math.inf),
        ):
            _check(name, getattr(self, name), low, high)
        _check("beta1", self.beta1, 0.0, BELOW_ONE)
        _check("beta2", self.beta2, 0.0, BELOW_ONE)
        if self.max_grad_norm is not None:
            _check("max_grad_norm", self.max_grad_norm, 0.0, math.inf)


def _check(name: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value < high):
        raise ConfigError(f"{name} {value} is outside [{low:g}, {high:.8g}); give a finite number inside")


@dataclass(frozen=True)
class LocalState:
    """A moment ("exp_avg", "exp_avg_sq") or the "master" of a parameter: those elements of this tensor-parallel rank's
    shard of it, in the order of memory, that this data-parallel rank keeps. `values` is flat.
    """

    name: str
    kind: str
    values: Tensor
    elements: tuple[int, int]


KeptGradients = list[tuple[set[str], Tensor | None]]
"""By flat buffer: which parameters' gradients wait, and a copy of all of them."""


class ShardedAdamW:
    """One rank's optimiser. Backward passes add into it; `step` updates the parameters and forgets the gradients."""

    def __init__(self, model: nn.Module, tp: Group, dp: Group, config: OptimizerConfig) -> None:
        self.tp, self.dp, self.config = tp, dp, config
        if released := [name for name, p in model.named_parameters() if is_released(p)]:
            raise ConfigError(
                f"{len(released)} weights of the model ({released[0]}, ...) are stored packed only, for serving; load "
                "it with packed=False to train it"
            )
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trained:
            raise ConfigError("no parameter of the model requires a gradient; there is nothing to train")
        kinds = [
            ({n: p for n, p in trained.items() if p.dim() >= 2}, True),
            ({n: p for n, p in trained.items() if p.dim() < 2}, False),
        ]
        self.flats = [FlatBuffers(parameters, dp, decays) for parameters, decays in kinds if parameters]
        self.steps = 0
        self._moments: dict[FlatBuffers, dict[str, Tensor]] = {}  # of this dp rank's slices; made with the first update
        self._guard = UpdateGuard(tp, dp, self.flats[0].master.device)
        self._hooks = [hook for flat in self.flats for hook in accumulating(flat)]

    def local_state(self) -> Iterator[LocalState]:
        """All that this rank keeps, not copied: moments by parameter, and the masters of parameters that are not
        float32 themselves.
        """
        for flat in self.flats:
            for name, parameter in flat.parameters.items():
                start, stop = flat.places[name]
                low = min(max(start, flat.slice.start), stop)
                high = max(low, min(stop, flat.slice.stop))
                elements, own = (low - start, high - start), slice(low - flat.slice.start, high - flat.slice.start)
                for kind in MOMENTS:
                    if high == low:
                        values = flat.master[:0]
                    elif flat in self._moments:
                        values = self._moments[flat][kind][own]
                    else:
                        values = torch.zeros((), device=flat.master.device).expand(high - low)
                    yield LocalState(name, kind, values, elements)
                if parameter.dtype is not torch.float32:
                    yield LocalState(name, "master", flat.master[low:high], elements)

    def prepare_state(self, steps: int) -> None:
        """Makes room for moments that `restore` then fills, as after `steps` updates."""
        self.steps = steps
        self._moments = {flat: {name: torch.zeros_like(flat.own_master) for name in MOMENTS} for flat in self.flats}
        self._guard.forget()

    def restore(self, flat: FlatBuffers, name: str, moment: str, local: Tensor) -> None:
        """Takes over one moment, or the master, of a parameter: this tensor-parallel rank's whole shard of it."""
        if moment == "master":
            flat.view(flat.master, name).copy_(local)
            return
        start, stop = flat.places[name]
        low, high = max(start, flat.slice.start), min(stop, flat.slice.stop)
        if low < high:
            own = self._moments[flat][moment][low - flat.slice.start : high - flat.slice.start]
            own.copy_(local.reshape(-1)[low - start : high - start])

    def zero_grad(self) -> None:
        """Forgets the gradients. Nothing is written: whoever comes first overwrites."""
        for flat in self.flats:
            flat.waiting.clear()

    def keep(self, values: bool) -> KeptGradients:
        """What waits, for `put_back`: with the numbers, where they will be added to, else only whose they are."""
        return [(set(flat.waiting), flat.grad.clone() if values else None) for flat in self.flats]

    def put_back(self, kept: KeptGradients) -> None:
        """The gradients that waited then wait again, bit for bit."""
        for flat, (waiting, values) in zip(self.flats, kept, strict=True):
            flat.waiting.clear()
            flat.waiting.update(waiting)
            if values is not None:
                flat.grad.copy_(values)

    def grad_norm(self) -> float:
        """The norm of the whole model's gradient, the same float on every rank; after `reduce`."""
        parameters = [p for flat in self.flats for p in flat.parameters.values()]
        grads = [flat.view(flat.grad, name) for flat in self.flats for name in flat.parameters]
        return math.sqrt(squared_norm(parameters, grads, self.tp))

    def reduce(self) -> None:
        """Adds the gradients of all data-parallel ranks; a parameter that got none has a gradient of zero."""
        for flat in self.flats:
            for name in flat.parameters.keys() - flat.waiting:
                flat.view(flat.grad, name).zero_()
                flat.waiting.add(name)
            for piece in flat.grad.split(PIECE) if self.dp.size > 1 else ():
                piece.copy_(self.dp.talk.sum(piece))

    def step(self, config: OptimizerConfig | None = None) -> float:
        """One update with the gradients added since the last; returns their norm before clipping. Where the norm, or
        any number that the update would write, is not finite: no update, no gradient is kept, an error on every rank.
        """
        config = config or self.config
        self.reduce()
        norm = self.grad_norm()
        if not math.isfinite(norm):
            self.zero_grad()
            raise NonFinite(f"the gradient norm of step {self.steps} is {norm}; no parameter was changed")
        if not self._moments:
            self.prepare_state(self.steps)
        rates = [self._rates(config, flat, norm) for flat in self.flats]
        try:
            self._guard.check(self.flats, self._moments, rates, norm, _update_one)
        except NonFinite:
            self.zero_grad()
            raise
        self._write(rates)
        self.zero_grad()
        self.steps += 1
        return norm

    def _rates(self, config: OptimizerConfig, flat: FlatBuffers, norm: float) -> Rates:
        scale = 1.0 if config.max_grad_norm is None else min(1.0, config.max_grad_norm / (norm + 1e-6))
        return Rates(
            step=self.steps + 1, learning_rate=config.learning_rate, beta1=config.beta1, beta2=config.beta2,
            epsilon=config.epsilon, weight_decay=config.weight_decay if flat.decays else 0.0, scale=scale,
        )  # fmt: skip

    def _write(self, rates: Sequence[Rates]) -> None:
        """What fails before the first number is written has changed nothing; later, this rank's weights are lost."""
        written = False
        try:
            for flat, rate in zip(self.flats, rates, strict=True):
                for _ in _update(flat, rate, **self._moments[flat]):
                    written = True
        except Exception as error:
            if not written:
                raise
            what = f"the update after step {self.steps} failed half-way, which no weight survives: {error!r}"
            raise WorkerError(what) from error

    def close(self) -> None:
        """Stops listening to the parameters' gradients."""
        for hook in self._hooks:
            hook.remove()
        for flat in self.flats:
            for parameter in flat.parameters.values():
                delattr(parameter, ATTRIBUTE)


def _update(flat: FlatBuffers, rates: Rates, exp_avg: Tensor, exp_avg_sq: Tensor) -> Iterator[None]:
    """This dp rank's slice, and all parameters from everybody's; yields whenever something has been written."""
    grad = flat.grad[flat.slice]
    if _native(flat.master) and flat.dp.size == 1 and flat.dtypes == {torch.bfloat16}:
        for name, parameter in flat.parameters.items():  # each one's master and its rounded copy in one go
            run = slice(*flat.places[name])
            copy = parameter.detach().view(-1)
            update(flat.master[run], grad[run], exp_avg[run], exp_avg_sq[run], rates, copy)
            yield
            written(parameter)
    else:
        for buffers in zip(
            *(own.split(_run(own)) for own in (flat.own_master, grad, exp_avg, exp_avg_sq)), strict=True
        ):
            master, gradient, first, second = buffers
            _update_one(master, gradient, first, second, rates)
            yield
        flat.gather()


def _run(own: Tensor) -> int:
    """Elements of one update: all of them by the kernel that copies nothing."""
    return max(1, len(own)) if _native(own) else PIECE


def _native(master: Tensor) -> bool:
    return master.is_cpu and library.available()


def _update_one(master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, rates: Rates) -> None:
    """One run of masters and moments in place, by the kernel that there is; the gradient stays as it is."""
    apply = update if _native(master) else _torch_update
    apply(master, grad, exp_avg, exp_avg_sq, rates)


def _torch_update(master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, rates: Rates) -> None:
    before = torch.tensor(float(rates.step - 1), device=grad.device)
    adamw.adamw(
        [master], [grad * rates.scale if rates.scale != 1.0 else grad], [exp_avg], [exp_avg_sq], [], [before],
        amsgrad=False, beta1=rates.beta1, beta2=rates.beta2, lr=rates.learning_rate,
        weight_decay=rates.weight_decay, eps=rates.epsilon, maximize=False, fused=True,
    )  # fmt: skip
