"""What may stand between a client and its server, in words: a proxy of the environment, encryption on one side only.

grpc's own messages name neither. Only words; the connection is made in tls.py.
"""

from __future__ import annotations

from tp_decoders.access.proxies import proxy_of

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
        found.append(f"this goes through the proxy of {proxy}: add {host} to no_proxy if that is not the way there")
    return "; ".join(found)
