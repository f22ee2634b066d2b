"""The token file: who may call, with which roles and limits; read again when it changes.

    [alice]                                # the name in messages and limits; the token itself is never shown
    sha256 = "9f86d0...0a08"               # of the token, as 64 hexadecimal digits; or token = "..." in plain
    roles = ["generate"]                   # of generate, train, control, observe
    requests_per_second = 5                # these and `expires = 2027-01-01T00:00:00Z` may be left out
    tokens_in_flight = 20000
    calls = 16
    weight = 2.0                           # of the engine, beside others' 1 (0.01 to 100)
    max_priority = 20                      # how many levels its calls may go before, or after, its own others

A file that is broken, gone or readable by strangers after a change keeps the grants it had, and the log says so.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import logging
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from cluster.access.access_config import file_version, read_secret
from parallel.errors import ConfigError

log = logging.getLogger(__name__)
WHAT = "the token file"
MIN_TOKEN_CHARACTERS = 16
LIMITS = ("requests_per_second", "tokens_in_flight", "calls", "weight", "max_priority")
WEIGHTS = (0.01, 100.0)
MAX_PRIORITY = 10
"""How many levels of priority a caller has that is not told otherwise, in either direction; with the role control
all."""
EVERY_PRIORITY = 1_000_000
KEYS = {"sha256", "token", "roles", "expires", *LIMITS}


class Role(enum.StrEnum):
    """What a token is for."""

    GENERATE = "generate"
    TRAIN = "train"
    CONTROL = "control"
    OBSERVE = "observe"


@dataclass(frozen=True, kw_only=True)
class Grant:
    """One token: its digest, what it may do and how much of it."""

    name: str
    digest: bytes = field(repr=False)
    roles: frozenset[Role]
    requests_per_second: float | None = None
    tokens_in_flight: int | None = None
    calls: int | None = None
    weight: float = 1.0
    max_priority: int | None = None
    expires: datetime | None = None

    @property
    def levels(self) -> int:
        """Of priority, in either direction."""
        if self.max_priority is not None:
            return self.max_priority
        return EVERY_PRIORITY if Role.CONTROL in self.roles else MAX_PRIORITY

    def valid(self, now: datetime) -> bool:
        return self.expires is None or now < self.expires


def digest_of(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def find(grants: tuple[Grant, ...], token: str, now: datetime) -> Grant | None:
    """The grant of a token. All digests are compared, each in constant time, so that timing tells nothing."""
    given, found = digest_of(token), None
    for grant in grants:
        if hmac.compare_digest(given, grant.digest):
            found = grant
    return found if found is not None and found.valid(now) else None


class TokenFile:
    """The grants of a file, as it is now."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._seen = file_version(path)
        self._grants = read_grants(path)

    def find(self, token: str) -> Grant | None:
        return find(self.grants(), token, datetime.now(UTC))

    def grants(self) -> tuple[Grant, ...]:
        """One `stat`, and the file again where that differs."""
        version = file_version(self._path)
        if version != self._seen:
            self._seen = version
            try:
                self._grants = read_grants(self._path)
                log.info("%s was read again: %d tokens", WHAT, len(self._grants))
            except ConfigError as error:
                log.error("the tokens stay as they were: %s", error)
        return self._grants


def read_grants(path: str) -> tuple[Grant, ...]:
    """All grants of a file that nobody else can read or change."""
    return parse_grants(read_secret(path, WHAT), path)


def parse_grants(data: bytes, path: str) -> tuple[Grant, ...]:
    """All grants in the bytes of a file, or what is wrong with it, in words that hold no secret."""
    try:
        entries = tomllib.loads(data.decode())
    except ValueError as error:
        place = re.search(r"\(at [^)]*\)", str(error))  # the rest of the message may quote the file
        raise ConfigError(f"{WHAT} {path} is not valid TOML {place.group() if place else ''}".rstrip()) from None
    grants = tuple(_grant(name, values, f"{WHAT} {path}: [{name}]") for name, values in entries.items())
    if not grants:
        raise ConfigError(f"{WHAT} {path} holds no token; nobody could call. Make one with tp-decoders token NAME")
    if len({grant.digest for grant in grants}) < len(grants):
        raise ConfigError(f"{WHAT} {path} holds one token under two names; each name needs its own")
    return grants


def _grant(name: str, values: Any, where: str) -> Grant:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{WHAT} begins with a setting of no token; write [NAME] above it")
    unknown = sorted(set(values) - KEYS)
    if unknown:
        raise ConfigError(f"{where} has unknown {unknown}; it takes {sorted(KEYS)}")
    expires = values.get("expires")
    if expires is not None and not (isinstance(expires, datetime) and expires.tzinfo):
        raise ConfigError(f"{where}.expires is no time with a zone; write it as 2027-01-01T00:00:00Z")
    limits = {key: _positive(values[key], key, where) for key in LIMITS if key in values}
    return Grant(name=name, digest=_digest(values, where), roles=_roles(values, where), expires=expires, **limits)


def _digest(values: Mapping[str, Any], where: str) -> bytes:
    if ("token" in values) == ("sha256" in values):
        raise ConfigError(f"{where} needs either sha256 (of the token, better) or token")
    given = values.get("token", values.get("sha256"))
    if not isinstance(given, str):
        raise ConfigError(f"{where}: the token or its sha256 is text; put it in quotes")
    if "token" in values:
        if len(given) < MIN_TOKEN_CHARACTERS or not given.isascii() or given.split() != [given]:
            least = f"at least {MIN_TOKEN_CHARACTERS} letters, digits and signs without spaces"
            raise ConfigError(f"{where}.token is too short or holds spaces or other letters; a token is {least}")
        return digest_of(given)
    if not re.fullmatch(r"[0-9a-fA-F]{64}", given):
        raise ConfigError(f"{where}.sha256 is not 64 hexadecimal digits; printf %s TOKEN | sha256sum gives them")
    return bytes.fromhex(given)


def _roles(values: Mapping[str, Any], where: str) -> frozenset[Role]:
    names, known = values.get("roles"), [role.value for role in Role]
    if not isinstance(names, list) or not names or not all(name in known for name in names):
        raise ConfigError(f"{where}.roles is {names!r}; give a list of {known}")
    return frozenset(map(Role, names))


def _positive(value: Any, key: str, where: str) -> Any:
    kinds = (int, float) if key in ("requests_per_second", "weight") else (int,)
    least = -1 if key == "max_priority" else 0
    if isinstance(value, bool) or not isinstance(value, kinds) or not least < value < float("inf"):
        raise ConfigError(f"{where}.{key} is {value!r}; give a number above {least}, or leave it out for the default")
    if key == "weight" and not WEIGHTS[0] <= value <= WEIGHTS[1]:
        raise ConfigError(f"{where}.weight is {value!r}; give a number from {WEIGHTS[0]:g} to {WEIGHTS[1]:g}")
    return value
