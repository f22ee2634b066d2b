"""Steps that only go on with sequences, recorded once per shape and replayed without the interpreter.

A program computes the last hidden states and the wanted rows of logits of T tokens and R rows, whichever sequences
they are of: tokens, positions, rows, block tables and lengths stand in buffers at fixed addresses, and everything else
is the model's. The first step of a shape is computed as always, the second one is watched (parallel.replay), every
other one replayed. What cannot be recorded or fails while replayed is computed as always in the same step, so that the
answer, or the error, is the same.

Of several ranks each decides for itself, since the sums over ranks are the same ones either way (shared_memory.py). A
rank whose replay fails between two of them computes the step with the results of those that are over; where a sum
fails, the group has failed, as in a step that is computed.

Programs are forgotten when a weight was written to or replaced, an adapter came or went, the cache's memory moved, or
the ranks met anew.
They hold no number of threads: kernels ask for it when they run. Results lie in the program's own memory and are
overwritten by its next replay.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor

from parallel.attention.cpu import Cpu, RunCache
from parallel.attention.forward_pass import Pass
from parallel.attention.metadata import AttentionMetadata
from parallel.native.compiled import library
from parallel.ranks.comm import Comm
from parallel.ranks.shared_memory import RecordedSums, ShmComm
from parallel.replay.module_state import ModuleState
from parallel.replay.program import Program
from parallel.replay.recorder import Recorder
from tp_decoders.model.decoder import Decoder

MOST_TOKENS = 128  # of a step: beyond, its kernels take far longer than the interpreter between them
MOST_NEW = 8  # of a sequence; more are a prompt's
MOST_PROGRAMS = 48
MOST_BYTES = 256 << 20  # of what all programs hold
Shape = tuple[int, int]
"""Tokens, and rows whose logits are wanted."""


@dataclass(frozen=True)
class StepInputs:
    """What the model is given in a step."""

    tokens: Tensor
    now: Pass
    metadata: AttentionMetadata
    rows: Tensor

    def overwrite(self, other: StepInputs) -> None:
        """Puts the other's values where these are, for whom holds their addresses."""
        self.tokens.copy_(other.tokens)
        self.now.positions_T.copy_(other.now.positions_T)
        self.rows.copy_(other.rows)
        self.metadata.paged_step.follow(other.metadata.paged_step)


@dataclass(frozen=True)
class Outputs:
    """[T, D] of the last block, and [R, V/p] logits."""

    x_TD: Tensor
    logits: Tensor


@dataclass(frozen=True)
class _Recorded:
    program: Program
    inputs: StepInputs
    outputs: Outputs
    sums: RecordedSums

    def run(self, comm: ShmComm | None) -> bool:
        """Whether all of it was computed."""
        return not self.program.replay() if comm is None else comm.replay(self.program, self.sums)


class DecodePrograms:
    """The programs of one model over one cache."""

    def __init__(self, model: Decoder, cache: RunCache) -> None:
        self.model, self.cache = model, cache
        self.replayed = 0
        self.refusals: dict[Shape, str] = {}  # why there is no program
        self._programs: OrderedDict[Shape, _Recorded] = OrderedDict()
        self._seen: set[Shape] = set()
        self._state: ModuleState | None = None
        self._memory: list[int] = []
        self._met: Comm | None = None

    def __len__(self) -> int:
        return len(self._programs)

    @property
    def nbytes(self) -> int:
        """Held by all programs."""
        return sum(recorded.program.nbytes for recorded in self._programs.values())

    def clear(self) -> None:
        """Forgets all, as if nothing had been computed yet."""
        self._programs.clear()
        self._seen.clear()
        self.refusals.clear()
        self._state = None

    def replay(self, inputs: StepInputs) -> Outputs | None:
        """The step's results from its program; None where it is to be computed, by `computed`."""
        shape = _shape(inputs)
        recorded = self._programs.get(shape)
        if recorded is None:
            return None
        if not self._holds():
            self.clear()
            return None
        recorded.inputs.overwrite(inputs)
        if not recorded.run(self._comm):
            del self._programs[shape]  # computing the step says what is wrong, or puts it right
            self._seen.discard(shape)
            return None
        self._programs.move_to_end(shape)
        self.replayed += 1
        return recorded.outputs

    def computed(self, inputs: StepInputs) -> Outputs:
        """The step's results as the model computes them; watched where that may make a program."""
        try:
            return self._computed(inputs)
        finally:
            if self._comm is not None:
                self._comm.computed()

    def _computed(self, inputs: StepInputs) -> Outputs:
        shape = _shape(inputs)
        if shape not in self._seen or shape in self.refusals:
            self._seen.add(shape)
            return self._forward(inputs)
        if not self._holds():
            self.clear()
            self._state, self._memory, self._met = ModuleState(self.model), self._addresses(), self.model.group.comm
        assert self._state is not None, "made when it did not hold"
        if not self._state.countable:
            self.refusals[shape] = "nobody counts the writes to some parameter"
        elif self._comm is not self.model.group.comm:
            self.refusals[shape] = "the ranks share no memory"
        if shape in self.refusals:
            return self._forward(inputs)
        return self._watched(shape, inputs)

    def _watched(self, shape: Shape, inputs: StepInputs) -> Outputs:
        inputs.metadata.paged_step  # noqa: B018 (made before, so that the program holds none of its own)
        with Recorder() as recorder:
            outputs = self._forward(inputs)
        program = recorder.program(outputs)
        if program is None or not self._holds():
            self.refusals[shape] = recorder.refusal or "a weight was written to meanwhile"
            return outputs
        self._programs[shape] = _Recorded(program, inputs, outputs, RecordedSums(program))
        self._make_room()
        return outputs

    def _make_room(self) -> None:
        while self._programs and (len(self._programs) > MOST_PROGRAMS or self.nbytes > MOST_BYTES):
            shape, _ = self._programs.popitem(last=False)
            self._seen.discard(shape)

    def _forward(self, inputs: StepInputs) -> Outputs:
        x_TD = self.model.hidden(inputs.tokens, inputs.now)
        return Outputs(x_TD, self.model.logits(x_TD, inputs.rows))

    def _holds(self) -> bool:
        """Whether model, cache and group are where and what they were when the first program was recorded."""
        return (
            self._state is not None
            and self._met is self.model.group.comm
            and self._memory == self._addresses()
            and self._state.holds()
        )

    @property
    def _comm(self) -> ShmComm | None:
        """What a program's sums go over."""
        comm = self.model.group.comm
        return comm if isinstance(comm, ShmComm) else None

    def _addresses(self) -> list[int]:
        return [memory.data_ptr() for memory in (*self.cache.keys, *self.cache.values)]


def programs_for(model: Decoder, cache: object, backend: object) -> DecodePrograms | None:
    """Where there can be any: on CPUs, whose attention is a kernel."""
    possible = model.has_vocabulary and isinstance(backend, Cpu) and isinstance(cache, RunCache)
    return DecodePrograms(model, cache) if possible else None  # type: ignore[arg-type]


def may_replay(query_lens: list[int], num_rows: int) -> bool:
    """Whether such a step is one that comes again."""
    return (
        0 < len(query_lens) <= sum(query_lens) <= MOST_TOKENS
        and max(query_lens) <= MOST_NEW
        and num_rows > 0
        and library.available()
    )


def _shape(inputs: StepInputs) -> Shape:
    return len(inputs.tokens), len(inputs.rows)
