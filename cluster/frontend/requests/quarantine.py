"""Which request killed an engine, when several were running: counted, tried apart, and then refused.

A death makes every request that was open on that engine a suspect. Suspects go on when an engine has proved, by its
canary or by news of others, that it works without them; together at first, and one at a time (suspect_trials.py) after
a second death. What an innocent does and a guilty one does not clears them: they go on beyond the place at which the
engine died. (An engine's news have left it before its next step begins, so that place is known.) Guilty is the one that
was running at two deaths at the same place, where nothing else can have done the second one; at three, the last one as
the only suspect; or that was at MOST deaths anywhere, the last one as the only suspect. An error that refuses an
innocent is worse than one more rebuild. The guilty one is answered with `Quarantined`, and the same content is refused
for QUARANTINE_S. Counts go by content, so that they outlive rebuilds, retries and, in the ledger, this process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from cluster.engine.request import Request
from cluster.frontend.requests.content_hash import ContentKeys
from cluster.request_errors import Quarantined
from parallel.errors import RequestError

log = logging.getLogger(__name__)
DEATHS = 2
"""At so many, one of them of an engine that had proved to work, a request is tried alone."""
MOST = 5
"""At so many it is guilty where it was the only suspect, wherever it was when it happened."""
MARGIN = 16
"""Tokens of every sample beyond the last death that clear a suspect."""
QUARANTINE_S = 600.0
"""How long what was found guilty is refused, and what was suspected is remembered."""
MOST_REMEMBERED = 4096
NOT_HERE = -1
"""The replica of a death in a process before this one."""


@dataclass(frozen=True)
class Death:
    """An engine's end."""

    replica: int
    cause: str
    proved: bool = True  # it had worked before


@dataclass(frozen=True)
class Count:
    """What is known of some content: the causes of the deaths at which it was running."""

    causes: tuple[str, ...]
    guilty: bool
    when: float  # of the clock on the wall


@dataclass
class Suspicion:
    """Of one open request. `gained`: tokens of each sample since the last death."""

    key: bytes
    deaths: list[Death] = field(default_factory=list)
    gained: dict[int, int] = field(default_factory=dict)

    @property
    def alone(self) -> bool:
        """Whether it has to be tried without any other suspect."""
        proved = any(death.proved for death in self.deaths)
        return (proved and len(self.deaths) >= DEATHS) or len(self.deaths) >= MOST


class Suspect(Protocol):
    """A request as far as it can be suspected."""

    suspicion: Suspicion | None

    def content_key(self, keys: ContentKeys) -> bytes: ...

    @property
    def unfinished(self) -> Sequence[int]:
        """The samples that have not ended."""
        ...

    @property
    def begun(self) -> bool:
        """Whether it has given a token: what it does then it did before without harm."""
        ...


Write = Callable[[bytes, Count | None], None]
Keys = Callable[[], Sequence[bytes]]
"""Hashing costs time, and nobody asks while nothing is suspected."""


class Quarantine:
    """The counts of everything that is suspected or refused. In the front-end's event loop only."""

    def __init__(
        self,
        counts: MutableMapping[bytes, Count] | None = None,
        write: Write | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._counts = {} if counts is None else counts  # oldest first
        self._write, self._clock = write, clock
        self._pardons: dict[int, tuple[int, bool]] = {}
        self._last: dict[int, tuple[Death, list[Suspect]]] = {}
        self.total = 0
        """Requests that were quarantined, of this process."""

    # ------------------------------------------------------------ at the door

    def refusal(self, keys: Keys) -> Quarantined | None:
        """Why content of one of these keys is not run, if it is not."""
        found = self._known(keys)
        return None if found is None or not found[1].guilty else _refused(found[1])

    def screened(self, made: Request | RequestError, keys: ContentKeys) -> Request | RequestError:
        """A call's prompt, or in its place why its content is not run."""
        return made if isinstance(made, RequestError) else self.refusal(partial(keys.both, made)) or made

    def suspect(self, suspect: Suspect, keys: Keys) -> None:
        """Content that was running at a death before, in another request or process, is a suspect from its start."""
        if (found := self._known(keys)) is not None:
            key, count = found
            suspect.suspicion = Suspicion(key, [Death(NOT_HERE, cause) for cause in count.causes])

    def _known(self, keys: Keys) -> tuple[bytes, Count] | None:
        oldest = self._clock() - QUARANTINE_S
        for key in keys() if self._counts else ():
            if (count := self._counts.get(key)) is not None and count.when >= oldest:
                return key, count
        return None

    # ------------------------------------------------------------ deaths

    def died(self, running: Sequence[Suspect], death: Death) -> Suspect | None:
        """An engine's end, with what was running there; the one that is guilty of it, where that is certain."""
        guilty, keys = self._guilty(running, death), ContentKeys()
        for suspect in running:
            suspicion = suspect.suspicion = suspect.suspicion or Suspicion(suspect.content_key(keys))
            suspicion.deaths.append(death)
            suspicion.gained = {}
            self._note(suspicion, guilty=False)
        if running:
            self._last[death.replica] = death, list(running)
        return guilty

    def _guilty(self, running: Sequence[Suspect], death: Death) -> Suspect | None:
        """Of those at an engine's end the one that did it, where nothing else can have."""
        before = [each for each in running if each.suspicion is not None]
        stuck = [each for each in before if death.proved and not _went_on(each)]
        suspects = {each.suspicion.key for each in before if each.suspicion is not None}
        if len(suspects) > 1:
            if stuck:
                log.warning("%d requests were running at two deaths; each is tried alone", len(stuck))
            return None
        newcomers = [each for each in running if each.suspicion is None and not each.begun]
        for each in stuck:
            if not newcomers or _deaths(each) >= DEATHS:
                return each
        return next((each for each in before if _deaths(each) + 1 >= MOST), None)

    def convict(self, suspect: Suspect) -> Quarantined:
        """Refuses its content from now on; what it is answered. The restarts that it cost do not count."""
        suspicion = suspect.suspicion
        if suspicion is None:
            raise ValueError("only what was running at a death is convicted")
        self.total += 1
        self._note(suspicion, guilty=True)
        *before, last = suspicion.deaths
        for death in before:
            past, following = self._pardons.get(death.replica, (0, False))
            self._pardons[death.replica] = past + 1, following
        self._pardons[last.replica] = self._pardons.get(last.replica, (0, False))[0], True
        return _refused(self._counts[suspicion.key])

    def pardons(self, replica: int) -> tuple[int, bool]:
        """How many past restarts of a replica, and whether the next one, were for requests now in quarantine; told
        once."""
        return self._pardons.pop(replica, (0, False))

    def absolve(self, replica: int) -> None:
        """What was taken for a death was none: the engine is there."""
        death, suspects = self._last.pop(replica, (None, []))
        for suspect in suspects:
            suspicion = suspect.suspicion
            if suspicion is not None and death in suspicion.deaths:
                suspicion.deaths = [each for each in suspicion.deaths if each is not death]
                if suspicion.deaths:
                    self._note(suspicion, guilty=False)
                else:
                    self.clear(suspect)

    # ------------------------------------------------------------ innocence

    def gained(self, suspect: Suspect, sample_index: int, tokens: int) -> None:
        """It went on; far enough, and it is no suspect any more."""
        suspicion = suspect.suspicion
        if suspicion is not None:
            suspicion.gained[sample_index] = suspicion.gained.get(sample_index, 0) + tokens
            if moved(suspect, MARGIN):
                self.clear(suspect)

    def clear(self, suspect: Suspect) -> None:
        suspicion, suspect.suspicion = suspect.suspicion, None
        if suspicion is not None and (known := self._counts.get(suspicion.key)) is not None and not known.guilty:
            del self._counts[suspicion.key]
            self._tell(suspicion.key, None)

    def _note(self, suspicion: Suspicion, guilty: bool) -> None:
        count = Count(tuple(death.cause for death in suspicion.deaths), guilty, self._clock())
        self._counts.pop(suspicion.key, None)
        self._counts[suspicion.key] = count
        while len(self._counts) > MOST_REMEMBERED:
            self._tell(oldest := next(iter(self._counts)), None)
            del self._counts[oldest]
        self._tell(suspicion.key, count)

    def _tell(self, key: bytes, count: Count | None) -> None:
        if self._write is not None:
            self._write(key, count)


def moved(suspect: Suspect, tokens: int) -> bool:
    """Whether every sample that has not ended went on by so many tokens since the last death."""
    suspicion = suspect.suspicion
    return suspicion is None or all(suspicion.gained.get(i, 0) >= tokens for i in suspect.unfinished)


def _went_on(suspect: Suspect) -> bool:
    """Whether any sample did since the last death; of many some may wait for their turn."""
    return suspect.suspicion is None or bool(suspect.suspicion.gained)


def _deaths(suspect: Suspect) -> int:
    return 0 if suspect.suspicion is None else len(suspect.suspicion.deaths)


def _refused(count: Count) -> Quarantined:
    causes = "; ".join(dict.fromkeys(count.causes))
    error = Quarantined(
        f"quarantined: {len(count.causes)} engines died while it was running ({causes}); it is not run again, nor is "
        f"the same content within {QUARANTINE_S:g} s; change it, and report it: no request should be able to do this. "
        f"If the causes lie elsewhere (a process killed from outside), ask again after {QUARANTINE_S:g} s"
    )
    error.deaths, error.causes = len(count.causes), count.causes
    return error
