"""What a server grants its clients' connections. What it grants their requests is FrontendConfig."""

from __future__ import annotations

from dataclasses import dataclass, fields

from parallel.options import check_above_zero


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """Sizes and times of the gRPC server."""

    max_message_bytes: int = 64 * 1024 * 1024  # of a request, and of an answer
    max_concurrent_rpcs: int = 4096  # open calls in all
    max_streams_per_connection: int = 2048  # open calls of one connection
    max_calls_per_client: int = 1024  # a client: a token, else a client certificate's name, else an address
    keepalive_seconds: float = 30.0  # a client that vanished is noticed after this and the next
    keepalive_timeout_seconds: float = 20.0  # for the answer to a ping
    receive_seconds: float = 60.0  # a client that opens a call has so long to send its message
    write_seconds: float = 120.0  # a client that reads nothing of its stream, or answer, for so long is dropped
    max_unread_bytes_per_client: int = 128 * 1024 * 1024  # of answers on their way
    max_unread_bytes: int = 512 * 1024 * 1024  # of all clients
    max_health_calls_per_client: int = 16  # of health and reflection, which need no token; their own places
    max_health_calls: int = 256  # of all clients, and an eighth of max_concurrent_rpcs at most
    handshake_seconds: float = 10.0  # for a connection's whole handshake, TLS included
    reflection: bool | None = None  # None: where only this machine can reach the server

    def __post_init__(self) -> None:
        check_above_zero("limits", self, (f.name for f in fields(self) if f.name != "reflection"))

    def options(self) -> list[tuple[str, int]]:
        """As gRPC channel arguments."""
        return [
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.max_concurrent_streams", self.max_streams_per_connection),
            ("grpc.keepalive_time_ms", int(self.keepalive_seconds * 1000)),
            ("grpc.keepalive_timeout_ms", int(self.keepalive_timeout_seconds * 1000)),
            ("grpc.http2.ping_timeout_ms", int(self.keepalive_timeout_seconds * 1000)),  # else gRPC waits 60 s longer
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 5000),
            ("grpc.server_handshake_timeout_ms", int(self.handshake_seconds * 1000)),
            ("grpc.so_reuseport", 0),  # two servers on one port would share its clients without a word
        ]
