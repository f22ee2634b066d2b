"""Who may read the metrics: nobody without a token where there are tokens; a silent reader stops no other."""

from __future__ import annotations

import http.client
import logging
import socket
import ssl
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.access.access_config import Security, TlsConfig
from cluster.access.token_file import Role
from launch.observe import metrics_server
from launch.observe.metrics_server import MetricsServer, check_host
from parallel.errors import ConfigError
from tests.cluster.access.token_files import TOKENS, security
from tests.cluster.rpc.certificates import Authority

Answer = tuple[int, str]


class One(Collector):
    def collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily("tp_decoders_one", "One.", value=1)


@contextmanager
def port_of(protection: Security | None = None) -> Iterator[int]:
    with closing(MetricsServer(One(), "127.0.0.1", 0, protection)) as server:
        yield server.port


def get(port: int, token: str | None = None, tls: ssl.SSLContext | None = None, path: str = "/metrics") -> Answer:
    kind = http.client.HTTPConnection
    connection = kind("127.0.0.1", port, timeout=60) if tls is None else _encrypted(port, tls)
    with closing(connection):
        connection.request("GET", path, headers={"Authorization": f"Bearer {token}"} if token else {})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def _encrypted(port: int, tls: ssl.SSLContext) -> http.client.HTTPSConnection:
    return http.client.HTTPSConnection("127.0.0.1", port, timeout=60, context=tls)


def test_without_tokens_loopback_is_open_and_gives_nothing_but_metrics() -> None:
    with port_of() as port:
        status, text = get(port)
        assert status == 200 and "tp_decoders_one 1.0" in text
        assert [get(port, path=path)[0] for path in ("/", "/metrics/x", "/metrics?name[]=a")] == [404, 404, 200]


@pytest.mark.parametrize("role", Role)
def test_with_tokens_only_who_observes_or_controls_reads(role: Role, tmp_path: Path) -> None:
    with port_of(security(tmp_path)) as port:
        status, text = get(port, TOKENS[role])
        if role in (Role.OBSERVE, Role.CONTROL):
            assert status == 200 and "tp_decoders_one 1.0" in text
        else:
            assert status == 403 and f"is for {role}; /metrics needs control or observe" in text
            assert "tp_decoders_one" not in text


def test_without_a_token_or_with_a_wrong_one_nothing_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = TOKENS[Role.OBSERVE]
    with port_of(security(tmp_path)) as port, caplog.at_level(logging.DEBUG):
        for token in (None, "a-token-that-nobody-knows-0123", good[:-1], good + "x"):
            for path in ("/metrics", "/elsewhere"):
                status, text = get(port, token, path=path)
                assert status == 401 and "tp_decoders" not in text, token
        assert get(port, good)[0] == 200
    assert good not in caplog.text and "nobody-knows" not in caplog.text


def test_the_token_travels_inside_tls_and_plain_http_reaches_nothing(tmp_path: Path) -> None:
    ca = Authority(tmp_path, "ours")
    pair = ca.sign("server")
    protection = Security(tls=TlsConfig(cert=pair.cert, key=pair.key), token_file=security(tmp_path).token_file)
    trusting = ssl.create_default_context(cafile=ca.path)
    trusting.check_hostname = False
    with port_of(protection) as port:
        assert get(port, TOKENS[Role.OBSERVE], trusting)[0] == 200
        assert get(port, None, trusting)[0] == 401 and get(port, TOKENS[Role.GENERATE], trusting)[0] == 403
        with pytest.raises((OSError, http.client.HTTPException)):
            get(port, TOKENS[Role.OBSERVE])
        with pytest.raises(ssl.SSLCertVerificationError):
            get(port, TOKENS[Role.OBSERVE], ssl.create_default_context())
        renewed = ca.sign("renewed")
        Path(pair.cert).write_bytes(Path(renewed.cert).read_bytes())  # and not yet its key: the old pair stays
        assert get(port, TOKENS[Role.OBSERVE], trusting)[0] == 200
        Path(pair.key).write_bytes(Path(renewed.key).read_bytes())
        assert get(port, TOKENS[Role.OBSERVE], trusting)[0] == 200


def test_readers_who_send_nothing_hold_up_no_other_and_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_server, "WAIT_S", 5.0)
    monkeypatch.setattr(metrics_server._Handler, "timeout", 5.0)
    ca = Authority(tmp_path, "ours")
    pair = ca.sign("server")
    trusting = ssl.create_default_context(cafile=ca.path)
    trusting.check_hostname = False
    with port_of(Security(tls=TlsConfig(cert=pair.cert, key=pair.key))) as port:
        silent = [socket.create_connection(("127.0.0.1", port), 60) for _ in range(metrics_server.READERS - 1)]
        assert get(port, tls=trusting)[0] == 200
        for one in silent:
            with one:
                assert one.recv(1) == b"", "hung up on"


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_others_reach_the_port_over_tls_and_known_or_not_at_all(host: str) -> None:
    tls = TlsConfig(cert="c", key="k")
    for open_to_all in (Security(), Security(token_file="t"), Security(tls=tls)):
        with pytest.raises(ConfigError, match="metrics_host.*insecure-listen-anywhere"):
            check_host(host, open_to_all, insecure=False)
        check_host(host, open_to_all, insecure=True)
    check_host(host, Security(tls=tls, token_file="t"), insecure=False)
    check_host(host, Security(tls=TlsConfig(cert="c", key="k", client_ca="a")), insecure=False)


def test_a_port_in_use_is_one_readable_error() -> None:
    with port_of() as port, pytest.raises(ConfigError, match=f"cannot give metrics on 127.0.0.1:{port}: "):
        MetricsServer(One(), "127.0.0.1", port)
