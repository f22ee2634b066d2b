"""Channels of gRPC as a client wants them: encrypted where its Access says so, past proxies where none is due."""

from __future__ import annotations

from typing import Any

import grpc

from tp_decoders.access.access import Access
from tp_decoders.access.addresses import host_of
from tp_decoders.access.private_files import read_file, read_secret
from tp_decoders.access.proxies import proxy_of

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 200),  # grpc's own goes up to two minutes: a server that is back sooner
    ("grpc.max_reconnect_backoff_ms", 2000),  # would not be noticed
    ("grpc.keepalive_time_ms", 30_000),  # a link that went silent under a call is noticed after this
    ("grpc.keepalive_timeout_ms", 20_000),  # and this
    ("grpc.enable_retries", 0),  # of grpc's own beside ours
    ("grpc.use_local_subchannel_pool", 1),  # a connection of its own: servers tell them apart
)


def async_channel(address: str, access: Access) -> grpc.aio.Channel:
    """For one event loop. What cannot be used of `access` is a SettingsError."""
    credentials, options = _settings(address, access)
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, credentials, options=options)


def blocking_channel(address: str, access: Access) -> grpc.Channel:
    """For threads of one process."""
    credentials, options = _settings(address, access)
    if credentials is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, credentials, options=options)


def call_metadata(access: Access) -> tuple[tuple[str, str], ...]:
    """What every call carries: the token, where there is one."""
    token = access.bearer()
    return () if token is None else (("authorization", f"Bearer {token}"),)


def _settings(address: str, access: Access) -> tuple[grpc.ChannelCredentials | None, tuple[tuple[str, Any], ...]]:
    host, options = host_of(address), OPTIONS
    if proxy_of(host) is None:
        options = (*options, ("grpc.enable_http_proxy", 0))
    access.check_way(address, host)
    if not access.encrypted:
        return None, options
    ca = None if access.tls_ca is None else read_file(access.tls_ca, "the server's CA")
    key = None if access.tls_key is None else read_secret(access.tls_key, "the key")
    cert = None if access.tls_cert is None else read_file(access.tls_cert, "the certificate")
    if access.tls_server_name is not None:
        options = (*options, ("grpc.ssl_target_name_override", access.tls_server_name))
    return grpc.ssl_channel_credentials(ca, key, cert), options
