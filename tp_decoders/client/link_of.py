"""From a client's arguments and the environment to a Link; the same for both clients."""

from __future__ import annotations

from dataclasses import replace

from tp_decoders.access.access import Access
from tp_decoders.access.addresses import address_of
from tp_decoders.client.transport.link import Link, Manners

TIMEOUT_S, RETRY_S, OVERLOAD_RETRIES = 600.0, 60.0, 2


def link_of(
    address: str | None, access: Access | None, timeout: float | None, retry_seconds: float, overload_retries: int
) -> Link:
    """`address` and `access` None: as the environment says. grpcs:// asks for TLS. What is wrong is a SettingsError."""
    place = address_of(address)
    access = Access.of_environment() if access is None else access
    if place.tls and not access.encrypted:
        access = replace(access, tls=True)
    return Link(place, access, Manners(timeout=timeout, retry_seconds=retry_seconds, overload_retries=overload_retries))
