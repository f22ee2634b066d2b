"""The door of a server, which all of its protocols share: the tokens, and how many calls each client has open."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.access.access_config import Security
from cluster.access.caller_limits import OpenCalls
from cluster.access.roles import Gate
from cluster.access.token_file import TokenFile
from cluster.rpc.services.connection_limits import ServerLimits


@dataclass(frozen=True)
class Door:
    """Who is let in, and the calls that are open."""

    gate: Gate
    open: OpenCalls
    open_to_all: OpenCalls
    """Of health and reflection, which need no token: their places are their own."""


def door_of(limits: ServerLimits, security: Security) -> Door:
    """The token file is read here, and again when it changes."""
    tokens = None if security.token_file is None else TokenFile(security.token_file)
    return gate_door(Gate(tokens), limits)


def gate_door(gate: Gate, limits: ServerLimits) -> Door:
    """A door with this gate."""
    for_health = min(limits.max_health_calls, limits.max_concurrent_rpcs // 8)
    counted = OpenCalls(limits.max_calls_per_client, limits.max_concurrent_rpcs - for_health)
    return Door(gate, counted, OpenCalls(limits.max_health_calls_per_client, max(1, for_health)))
