"""What a request asks of an engine, as a hash: the same for the same content, whatever its name.

Lists may be long and common to all prompts of a call (65,536 biases, say), so each is hashed once for all requests that
are looked at together.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import fields
from hashlib import sha256

from cluster.engine.request import Request

SHORT = 16
"""Entries of a list that is not worth a hash of its own."""


class ContentKeys:
    """Of requests that are alive meanwhile: lists are known by their identity."""

    def __init__(self) -> None:
        self._digests: dict[int, bytes] = {}

    def of(self, request: Request, seed: bool) -> bytes:
        """Of all that decides what an engine does for it, the seed included or not."""
        given = request.sampling
        sampling = {name.name: self._brief(getattr(given, name.name)) for name in fields(given) if name.name != "seed"}
        stopping = {name: self._brief(value) for name, value in vars(request.stopping).items()}
        drawn = given.seed if seed else None
        asked = (
            self._digest(request.token_ids), drawn, sampling, stopping, request.response, request.score_only,
            request.pooling,
        )  # fmt: skip
        return sha256(repr(asked).encode()).digest()

    def both(self, request: Request) -> tuple[bytes, bytes]:
        """Both keys that a request's content may be counted under."""
        return self.of(request, seed=False), self.of(request, seed=True)

    def _brief(self, value: object) -> object:
        long = isinstance(value, tuple | Mapping) and len(value) > SHORT
        return self._digest(value) if long else sorted(value.items()) if isinstance(value, Mapping) else value

    def _digest(self, value: object) -> bytes:
        found = self._digests.get(id(value))
        if found is None:
            found = self._digests[id(value)] = sha256(_bytes(value)).digest()
        return found


def _bytes(value: object) -> bytes:
    if isinstance(value, Mapping):
        keys = sorted(value)
        return array("q", keys).tobytes() + array("d", map(value.__getitem__, keys)).tobytes()
    if isinstance(value, tuple) and value and isinstance(value[0], int):
        return array("q", value).tobytes()
    return repr(value).encode()
