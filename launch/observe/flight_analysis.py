"""Reads the flight recorder dumps of one fault and says which rank fell out of step, and in which command.

Ranks execute the same commands in the same order, and in each of them issue the same collectives. So the ranks'
records are cut at the commands; the first command in which they differ is where it happened. Of two ranks that differ
the odd one is told by how commands of this name went before. Pure: no file, no printing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from parallel.ranks.flight_recorder import COLLECTIVE, COMMAND

ISSUE = "broadcast_bytes"
"""The collective that carries a command."""
SUMS = ("tree_sum", "sum")
STREAM = "the stream"
"""What is recorded outside of any command: of groups without a command stream, everything."""


@dataclass
class Span:
    """One command on one rank: the collectives issued in it (of a sum with its plan, as in "tree_sum 1f2e3d4c": over
    which division of which axis), and whether the rank has left it.
    """

    number: int
    name: str
    kinds: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)  # bytes this rank gave
    ended: bool = False

    def add(self, kind: str, number: int, nbytes: int) -> None:
        self.kinds.append(kind)
        self.numbers.append(number)
        self.sizes.append(nbytes)

    def proportions(self) -> tuple[tuple[str, float | None], ...]:
        """Each collective with its size relative to the first's: that of sums does not depend on the batch."""
        first = self.sizes[0] if self.sizes else 0
        pairs = zip(self.kinds, self.sizes, strict=True)
        return tuple((kind, size / first if first and kind.split()[0] in SUMS else None) for kind, size in pairs)


@dataclass(frozen=True)
class RankRecord:
    """One rank's dump, its records cut at the commands."""

    rank: int
    world: int
    node: str
    error: str
    consequence: bool
    spans: Mapping[int, Span]
    last: tuple[float, str, str, int, int] | None

    @property
    def in_command(self) -> Span | None:
        return self.spans[max(self.spans)] if self.spans else None

    def where(self) -> str:
        """The command it was in, and the last collective it began."""
        span = self.in_command
        if span is None:
            return "no record"
        command = "no command" if span.number == 0 else f"command {span.number} ({span.name})"
        collectives = f"{span.kinds[-1]} number {span.numbers[-1]}" if span.kinds else "no collective yet"
        if span.ended:
            return f"after {command}, waiting for the next one"
        return f"in {command}, last began {collectives}"


@dataclass(frozen=True)
class Verdict:
    """What the dumps say. `ranks` are those that fell out of step; none where that cannot be told."""

    ranks: tuple[int, ...]
    command: int | None
    text: str


def read_ranks(dumps: Sequence[Mapping[str, Any]]) -> list[RankRecord]:
    """The dumps of one fault as records of commands, up to the moment when the first rank failed."""
    commanded = any(record[1] == COMMAND for dump in dumps for record in dump["records"])
    return [_read(dump, commanded) for dump in _until_the_first_failed(dumps)]


def _until_the_first_failed(dumps: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Without what ranks of the same node, and so of the same clock, began after the first of them had given up."""
    first = min(dumps, key=lambda dump: float(dump["time"]))
    for dump in dumps:
        later = dump["time"] - first["time"]
        same_clock = dump["node"] == first["node"]
        yield {**dump, "records": [one for one in dump["records"] if not same_clock or one[0] >= later]}


def _read(dump: Mapping[str, Any], commanded: bool) -> RankRecord:
    spans: dict[int, Span] = {}
    for span in _spans(dump["records"], dump["rank"] == 0, commanded):
        if span.number in spans:  # a new stream of commands over the same communicator
            spans.clear()
        spans[span.number] = span
    if dump["forgotten"] and spans:
        spans.pop(min(spans))  # its beginning was written over
    records = dump["records"]
    return RankRecord(
        rank=dump["rank"], world=dump["world"], node=dump["node"], error=dump["error"],
        consequence=dump["consequence"], spans=spans, last=tuple(records[-1]) if records else None,
    )  # fmt: skip


def _spans(records: Sequence[Sequence[Any]], first: bool, commanded: bool) -> Iterator[Span]:
    """Rank 0 notes a command before it sends it; the others wait for it, then note it."""
    span, sent = Span(0, STREAM), True
    for _, what, name, number, nbytes in records:
        if what == COMMAND:
            span.ended = True
            yield span
            span, sent = Span(number, name), not first
        elif what == COLLECTIVE and commanded and name == ISSUE:
            span.ended = span.ended or sent  # a follower's wait for the next command
            sent = True
        else:
            span.add(name, number, nbytes)
    yield span


def judge(ranks: Sequence[RankRecord]) -> Verdict:
    """Which rank fell out of step, in which command."""
    ranks = sorted(ranks, key=lambda one: one.rank)
    found = _first_difference(ranks)
    if found is not None:
        return found
    own = [one for one in ranks if one.error and not one.consequence]
    if own:
        return _failed(own)
    return _unusual_sizes(ranks) or _behind(ranks)


def _failed(own: Sequence[RankRecord]) -> Verdict:
    text = "; ".join(f"rank {one.rank} on {one.node} failed {one.where()}: {one.error}" for one in own)
    span = own[0].in_command
    return Verdict(tuple(one.rank for one in own), span.number if span else None, text)


def _first_difference(ranks: Sequence[RankRecord]) -> Verdict | None:
    """Where ranks that began the same command issued different collectives in it, beyond one being further."""
    known: dict[str, Counter[tuple[str, ...]]] = {}
    for number in sorted(set.intersection(*(set(one.spans) for one in ranks)) if ranks else ()):
        spans = {one.rank: one.spans[number] for one in ranks}
        if not _in_step(list(spans.values())):
            return _name_the_odd(ranks, spans, known)
        if all(span.ended for span in spans.values()):
            span = spans[ranks[0].rank]
            known.setdefault(span.name, Counter())[tuple(span.kinds)] += 1
    return None


def _in_step(spans: Sequence[Span]) -> bool:
    longest = max(spans, key=lambda span: len(span.kinds))
    for span in spans:
        if span.name != longest.name or span.kinds != longest.kinds[: len(span.kinds)]:
            return False
        if span.ended and len(span.kinds) < len(longest.kinds):
            return False
    return True


def _name_the_odd(
    ranks: Sequence[RankRecord], spans: Mapping[int, Span], known: Mapping[str, Counter[tuple[str, ...]]]
) -> Verdict:
    name, number = next((span.name, span.number) for span in spans.values())
    usual = known.get(name, Counter())
    odd = [rank for rank, span in spans.items() if not _usual(span, usual)] if usual else []
    if not odd or len(odd) == len(spans):
        odd = _minority(spans)
    command = "the stream of collectives" if number == 0 else f"command {number} ({name})"
    if not odd:
        parts = "; ".join(f"rank {rank} issued {_listed(span.kinds)}" for rank, span in spans.items())
        return Verdict((), number, f"the ranks fell out of step in {command}, and nothing tells which: {parts}")
    nodes = {one.rank: one.node for one in ranks}
    model = _expected([span for rank, span in spans.items() if rank not in odd], usual)
    said = [f"rank {rank} on {nodes[rank]} fell out of step in {command}: {_how(spans[rank], model)}" for rank in odd]
    return Verdict(tuple(odd), number, "; ".join(said))


def _usual(span: Span, usual: Counter[tuple[str, ...]]) -> bool:
    """Whether commands of this name went so before, as far as this one has gone."""
    kinds = tuple(span.kinds)
    return kinds in usual if span.ended else any(known[: len(kinds)] == kinds for known in usual)


def _minority(spans: Mapping[int, Span]) -> list[int]:
    """The ranks that are not like most of them, where there is such a thing."""
    groups = Counter(tuple(span.kinds) for span in spans.values())
    most, count = groups.most_common(1)[0]
    return [rank for rank, span in spans.items() if tuple(span.kinds) != most] if 2 * count > len(spans) else []


def _expected(others: Sequence[Span], usual: Counter[tuple[str, ...]]) -> tuple[str, ...]:
    """What the odd rank should have issued: what this command's like did before and the others do now."""
    longest = max((tuple(span.kinds) for span in others), key=len, default=())
    like = [kinds for kinds, _ in usual.most_common() if kinds[: len(longest)] == longest]
    return like[0] if like else longest


def _how(span: Span, model: Sequence[str]) -> str:
    same = _same(span.kinds, model)
    issued, due = len(span.kinds), len(model)
    missing = Counter(model) - Counter(span.kinds)
    if span.ended and issued < due and missing:
        place = f" (at the latest its collective {same + 1})"
        return f"it issued {issued} collectives and {due} were due, it skipped {_listed(missing.elements())}{place}"
    here = f"{span.kinds[same]} number {span.numbers[same]}" if same < issued else "nothing more"
    wanted = model[same] if same < due else "nothing more"
    return f"its collective {same + 1} is {here}, where {wanted} was due"


def _listed(kinds: Any) -> str:
    counts = Counter(kinds)
    return ", ".join(f"{count} x {kind}" if count > 1 else kind for kind, count in counts.items()) or "nothing"


def _unusual_sizes(ranks: Sequence[RankRecord]) -> Verdict | None:
    """All issue the same, but in the last command one gives other sizes than it always did: it is a collective off."""
    last = max(set.intersection(*(set(one.spans) for one in ranks)), default=0) if ranks else 0
    found = [(one, place) for one in ranks if last and (place := _first_unusual_size(one, last)) is not None]
    if not found or len(found) == len(ranks):
        return None
    said = []
    for one, place in found:
        span = one.spans[last]
        call = f"{span.kinds[place]} number {span.numbers[place]} of {span.sizes[place]} bytes"
        said.append(
            f"rank {one.rank} on {one.node} fell out of step in command {last} ({span.name}): its collective "
            f"{place + 1} is {call}, a size it never had there; it skipped one before it, or issued one too many"
        )
    return Verdict(tuple(one.rank for one, _ in found), last, "; ".join(said))


def _first_unusual_size(one: RankRecord, last: int) -> int | None:
    name, given = one.spans[last].name, one.spans[last].proportions()
    before = [span.proportions() for number, span in one.spans.items() if span.name == name and number != last]
    if not before or any(known[: len(given)] == given for known in before):
        return None
    like = max(_same(given, known) for known in before)
    return like if like < len(given) else None


def _same(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How far two go alike."""
    pairs = list(zip(one, other, strict=False))
    return next((place for place, (a, b) in enumerate(pairs) if a != b), len(pairs))


def _behind(ranks: Sequence[RankRecord]) -> Verdict:
    """In step as far as they went: who left no dump, or went less far than the others."""
    world = max((one.world for one in ranks), default=0)
    absent = tuple(rank for rank in range(world) if rank not in {one.rank for one in ranks})
    others = "; ".join(f"rank {one.rank} was {one.where()}" for one in ranks)
    command = max((span.number for one in ranks if (span := one.in_command)), default=None)
    if absent:
        names = f"rank {absent[0]}" if len(absent) == 1 else f"ranks {list(absent)}"
        return Verdict(absent, command, f"{names} left no dump: killed, frozen or cut off, or not given here; {others}")
    progress = {one.rank: _progress(one) for one in ranks}
    least, most = min(progress.values(), default=(0, 0, 0)), max(progress.values(), default=(0, 0, 0))
    if least == most:
        return Verdict((), command, f"the ranks are in step; {others}")
    late = tuple(rank for rank, done in progress.items() if done == least)
    return Verdict(late, command, f"rank {late[0]} is behind: {others}")


def _progress(one: RankRecord) -> tuple[int, int, int]:
    span = one.in_command
    return (0, 0, 0) if span is None else (span.number, span.ended, len(span.kinds))
