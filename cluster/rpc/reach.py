"""What may stand between a client and its server, in words: a proxy of the environment, encryption on one side only.

grpc's own messages name neither. Only words; the connection is made in tls.py.
"""

from __future__ import annotations

import os
from urllib.request import proxy_bypass

from cluster.rpc.auth_config import is_loopback

PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
"""Where grpc looks for a proxy, in its order."""
NO_TLS_HERE = ("socket closed", "connection reset", "recvmsg", "transport closed", "endpoint closing", "end of tcp")
"""What grpc says where plain text met a port that speaks TLS, among other reasons."""
NO_TLS_THERE = ("wrong_version_number", "wrong version number", "ssl_error_ssl")


def advice(host: str, encrypted: bool, said: str = "") -> str:
    """What to try where the server at `host` was not reached and grpc said `said`; empty where nothing is known."""
    found = []
    said = said.lower()
    if encrypted and any(words in said for words in NO_TLS_THERE):
        found.append("the server may not speak TLS: leave --tls and --tls-ca out")
    if not encrypted and any(words in said for words in NO_TLS_HERE):
        found.append("the server may speak TLS: give its CA (--tls-ca) or --tls")
    proxy = proxy_of(host)
    if proxy is not None:
        found.append(f"grpc goes through the proxy of {proxy}: add {host} to no_proxy if that is not the way there")
    return "; ".join(found)


def proxy_of(host: str) -> str | None:
    """The setting, as NAME=VALUE, of the proxy that grpc takes for `host`; None where it takes none."""
    name = next((name for name in PROXIES if os.environ.get(name)), None)
    if name is None or is_loopback(host):
        return None
    return None if proxy_bypass(host) else f"{name}={os.environ[name]}"
