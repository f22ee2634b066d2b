"""Which connections go through a proxy of the environment, as curl and Python understand it.

grpc reads http_proxy and no_proxy by rules of its own: it takes a proxy even to addresses of this machine, and passes
over NO_PROXY, `*` and (in older versions) networks. So where no proxy is due it is told to use none.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from urllib.request import proxy_bypass

PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
"""Where grpc looks for a proxy, in its order."""
EXCEPTIONS = ("no_grpc_proxy", "no_proxy", "NO_PROXY")


def proxy_of(host: str) -> str | None:
    """The setting, as NAME=VALUE, of the proxy that is taken for `host`; None where none is."""
    name = next((name for name in PROXIES if os.environ.get(name)), None)
    return None if name is None or _excepted(host) or is_own(host) else f"{name}={os.environ[name]}"


def is_own(host: str) -> bool:
    """Whether all addresses of a name are this machine's."""
    addresses = _addresses(host)
    return bool(addresses) and all(map(_can_be_bound, addresses))


def _excepted(host: str) -> bool:
    """Whether no_proxy names it: itself, a domain it is in, a network it is in, or everything (`*`)."""
    if proxy_bypass(host):
        return True
    entries = [entry.strip(" []") for name in EXCEPTIONS for entry in os.environ.get(name, "").split(",")]
    if "*" in entries or any(_is_below(host, entry) for entry in entries):
        return True
    networks = [network for network in map(_network, entries) if network is not None]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return any(address in network for network in networks)


def _is_below(host: str, domain: str) -> bool:
    domain = domain.lower().lstrip("*").lstrip(".")
    return bool(domain) and (host.lower() == domain or host.lower().endswith(f".{domain}"))


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None


def _addresses(host: str) -> list[tuple[socket.AddressFamily, str]]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM) if host else []
    except OSError:
        return []
    return [(entry[0], str(entry[4][0])) for entry in found]


def _can_be_bound(address: tuple[socket.AddressFamily, str]) -> bool:
    family, host = address
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True
