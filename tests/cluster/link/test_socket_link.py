"""An engine behind a connection: authenticated, limited in every wait, faults that name what happened."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import random
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from msgspec import msgpack

from cluster.engine.request import Request, ResponseOptions, StoppingCriteria, TokenEvent
from cluster.frontend.frontend import Frontend, State
from cluster.link import socket_link
from cluster.link.engine_server import EngineServer
from cluster.link.messages import MAX_BYTES, Events, Submit, encode
from cluster.link.socket_link import SocketLink
from cluster.link.wire import Wire, connect
from parallel.errors import WorkerError
from parallel.keyed_listener import NONCE
from tests.cluster.frontend.fakes import CODEC, ENDLESS, LASTING, LIMITS, FakeEngine, tokens_of
from tests.cluster.frontend.harness import answer, call, run, until
from tests.cluster.link.engine_process import engine_process

KEY = b"k" * 32


class ServedEngine:
    """A fake engine behind an EngineServer in a thread of this process."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.server = EngineServer(engine, KEY)
        self.thread = threading.Thread(target=self.server.serve, daemon=True)
        self.thread.start()

    def __enter__(self) -> ServedEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.stop()
        self.thread.join(60)
        assert not self.thread.is_alive(), "the server did not stop in time"

    def link(self, key: bytes = KEY, timeout: float = 60.0) -> SocketLink:
        return SocketLink(self.server.address, key, timeout)


def test_answers_over_a_connection_equal_those_without() -> None:
    async def main() -> None:
        with ServedEngine(FakeEngine()) as served:
            frontend = Frontend(served.link(), codec=CODEC)
            frontend.start()
            assert frontend.limits == LIMITS
            results = await answer(frontend, call([1], [2], [3]))
            assert [r.samples[0].token_ids for r in results] == [tokens_of([i], 1, 0, 8) for i in (1, 2, 3)]
            assert (await frontend.load()).steps == served.engine.steps
            await frontend.close()

    run(main())


def test_a_front_end_that_goes_away_ends_its_requests_and_the_next_one_is_served() -> None:
    async def main() -> None:
        with ServedEngine(FakeEngine(limits=ENDLESS, step_seconds=0.005)) as served:
            for _ in range(2):
                frontend = Frontend(await asyncio.to_thread(served.link), codec=CODEC)
                frontend.start()
                await frontend.open(call([1], stopping=StoppingCriteria(max_new_tokens=LASTING)))
                await until(lambda: len(served.engine.live) == 1)
                frontend.fleet.replicas[0].link.close()
                await until(lambda: not served.engine.live)

    run(main())


def test_a_wrong_key_is_refused_and_the_server_serves_on() -> None:
    with ServedEngine(FakeEngine()) as served:
        with pytest.raises(WorkerError, match="PermissionError.*the key is wrong"):
            served.link(b"w" * 32)
        served.link().close()


def test_a_stranger_that_says_nothing_is_hung_up_on_and_holds_nobody_up_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("parallel.keyed_listener.PROOF_S", 2.0)
    with ServedEngine(FakeEngine()) as served:
        with socket.create_connection(served.server.address) as silent:
            served.link().close()
            silent.settimeout(60.0)
            while silent.recv(1024):
                pass
        with socket.create_connection(served.server.address) as noisy:
            noisy.sendall(b"GET / HTTP/1.1\r\n\r\n" * 10)
        served.link().close()


class Planted:
    """A pickle that writes a file where it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("length", [None, -1, (1 << 31) - 1])
def test_what_a_stranger_sends_is_bounded_and_never_unpickled(length: int | None, tmp_path: Path) -> None:
    planted = pickle.dumps(Planted(tmp_path / "planted"))
    with ServedEngine(FakeEngine()) as served:
        with socket.create_connection(served.server.address, 60.0) as stranger, contextlib.suppress(ConnectionError):
            stranger.sendall(struct.pack("!i", len(planted) if length is None else length) + planted)
            stranger.sendall(struct.pack("!i", len(planted)) + planted)
            while stranger.recv(1024):
                pass
        served.link().close()
    assert not list(tmp_path.iterdir())


def test_a_false_engine_is_refused_in_words(tmp_path: Path) -> None:
    planted = pickle.dumps(Planted(tmp_path / "planted"))
    with socket.create_server(("127.0.0.1", 0)) as false:

        def serve() -> None:
            with false.accept()[0] as peer, contextlib.suppress(OSError):
                peer.sendall(2 * (struct.pack("!i", len(planted)) + planted))
                peer.recv(1024)

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(WorkerError, match="did not greet this front-end"):
            SocketLink(false.getsockname()[:2], KEY, 60.0)
    assert not list(tmp_path.iterdir())


def test_nobody_there_is_an_error_within_the_time_limit() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        with pytest.raises(WorkerError, match=r"127\.0\.0\.1.*another front-end"):
            SocketLink(mute.getsockname(), KEY, 0.3)
        address = mute.getsockname()
    with pytest.raises(WorkerError, match="ConnectionRefusedError"):
        SocketLink(address, KEY, 0.3)


def test_an_engine_that_raises_tells_its_front_end_why() -> None:
    async def main() -> None:
        with engine_process(crash_at_step=1) as served:
            frontend = Frontend(served.link(), codec=CODEC)
            frontend.start()
            await frontend.open(call([1]))
            await until(lambda: frontend.state is State.FAILED)
            assert "RuntimeError: the fake engine was told to fail" in frontend.fault_cause
            served.process.join(60)
            assert served.process.exitcode == 1, "rank 0 ends with an error, for its supervisor to see"
            await frontend.close()

    run(main())


def test_a_stopped_process_is_a_fault_within_the_silence_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket_link, "SILENCE_SECONDS", 4.0)

    async def main() -> None:
        with engine_process() as served:
            frontend = Frontend(served.link(), codec=CODEC)
            frontend.start()
            await asyncio.sleep(4.5)
            assert frontend.state is State.SERVING, "an idle engine is not silent: it beats"
            served.signal(signal.SIGSTOP)
            await until(lambda: frontend.state is State.FAILED)
            assert "no sign of life" in frontend.fault_cause
            await frontend.close()

    run(main())


def test_a_front_end_that_reads_nothing_is_dropped_and_never_holds_up_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cluster.link.engine_server.FRONTEND_SILENCE_SECONDS", 1.0)
    with ServedEngine(FakeEngine(limits=ENDLESS, tokens_per_step=2048)) as served:
        connection = connect(served.server.address, KEY, 60.0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire = Wire(connection, "deaf")
        stopping = StoppingCriteria(max_new_tokens=LASTING)
        asked = Request(request_id="x", token_ids=(1,), stopping=stopping, response=ResponseOptions(logprobs=1))
        wire.send(Submit((asked,)))
        wait_for(lambda: served.engine.steps > 5)
        wait_for(lambda: not served.engine.live)
        wire.close()
        served.link().close()


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def test_strangers_who_say_little_or_nothing_keep_no_front_end_out() -> None:
    with ServedEngine(FakeEngine()) as served:
        silent = [socket.create_connection(served.server.address) for _ in range(40)]
        dribbling = socket.create_connection(served.server.address)
        dribbling.sendall(b"\0\0\0\xff")
        began = time.monotonic()
        link = served.link(timeout=30.0)
        assert link.limits == served.engine.limits
        link.close()
        for each in silent:
            each.close()
        dribbling.settimeout(30.0)
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - began < 60.0:
                dribbling.sendall(b"x")
                time.sleep(0.2)
            raise AssertionError("a handshake may take as long as it likes")


@pytest.mark.parametrize("where", ["at the front-end", "at rank 0"])
def test_a_message_that_cannot_be_taken_is_a_fault_and_nobody_waits_for_ever(where: str) -> None:
    async def main() -> None:
        with ServedEngine(FakeEngine(limits=ENDLESS, step_seconds=0.005)) as served:
            frontend = Frontend(await asyncio.to_thread(served.link), codec=CODEC)
            frontend.start()
            await frontend.open(call([1], stopping=StoppingCriteria(max_new_tokens=LASTING)))
            link = frontend.fleet.replicas[0].link
            if where == "at rank 0":
                link._wire.send(Submit(("no request",)))  # type: ignore[attr-defined, arg-type]
            else:
                served.server._send(Events(("no event",)))  # type: ignore[arg-type]
            await until(lambda: frontend.state is State.FAILED)
            assert "could not be taken" in frontend.fault_cause or "was lost" in frontend.fault_cause
            await frontend.close()
            served.link().close()  # the next one is served

    run(main())


def test_what_cannot_be_written_is_a_lost_connection_too() -> None:
    async def main() -> None:
        with ServedEngine(FakeEngine()) as served:
            frontend = Frontend(await asyncio.to_thread(served.link), codec=CODEC)
            frontend.start()
            frontend.fleet.replicas[0].link._wire.send(lambda: None)  # type: ignore[attr-defined]
            await until(lambda: frontend.state is State.FAILED)
            await frontend.close()

    run(main())


def test_the_news_of_a_step_have_left_before_the_next_one_begins() -> None:
    class Watched(FakeEngine):
        late = 0

        def step(self) -> list[TokenEvent]:
            self.late += not served.server._written.is_set()
            return super().step()

    async def main() -> None:
        frontend = Frontend(await asyncio.to_thread(served.link), codec=CODEC)
        frontend.start()
        await answer(frontend, call([1], stopping=StoppingCriteria(max_new_tokens=200)))
        await frontend.close()

    engine = Watched()
    with ServedEngine(engine) as served:
        run(main())
    assert engine.steps >= 200 and engine.late <= 2, "but for a machine that stands still"


@pytest.mark.parametrize("thread", ["run", "_serve_peers"])
def test_a_thread_that_fails_ends_the_engine_rather_than_leave_it_deaf(
    thread: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = EngineServer(FakeEngine(), KEY)
    monkeypatch.setattr(server._listener if thread == "run" else server, thread, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        server.serve()


@pytest.mark.parametrize("known", [False, True], ids=["a stranger", "who has the key"])
def test_hostile_bytes_are_refused_and_logged_once_and_disturb_nothing(
    known: bool, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    draw = random.Random(5)
    good = bytes(encode(Submit((Request(request_id="x", token_ids=tuple(range(1, 9))),))))
    bad = {
        "random": [behind_a_length(draw.randbytes(draw.randrange(1, 300))) for _ in range(60)],
        "truncated": [behind_a_length(good[4 : 4 + draw.randrange(len(good) - 5)]) for _ in range(20)],
        "wrong types": [behind_a_length(msgpack.encode(value)) for value in WRONG],
        "oversized": [b"\xff\xff\xff\xff", struct.pack("!I", MAX_BYTES + 1) + good, *HUGE],
        "a pickle": [behind_a_length(pickle.dumps(Planted(tmp_path / "planted")))],
    }
    with ServedEngine(FakeEngine()) as served:
        for name, messages in bad.items():
            for said in messages:
                caplog.clear()
                connect_as = partial(connect, authkey=KEY) if known else socket.create_connection
                peer = connect_as(served.server.address, timeout=60.0)
                with peer, contextlib.suppress(ConnectionError):
                    peer.settimeout(60.0)
                    peer.sendall(said + bytes(0 if known else 3 * NONCE))
                    while peer.recv(4096):
                        pass
                wait_for(lambda: bool(caplog.records))
                time.sleep(0.01)
                assert len(caplog.records) == 1, (name, said[:40], [record.message for record in caplog.records])
        assert not served.engine.submitted and served.engine.steps == 0
        link = served.link()
        link.start(lambda events: None, lambda cause: None)
        assert link.load(60.0).steps == 0
        link.close()
    assert not list(tmp_path.iterdir())


WRONG: tuple[object, ...] = (
    None, 7, "Beat", [], {}, ["Nothing"], ["Submit"], ["Submit", 7], ["Submit", [7]], ["Submit", [{"token_ids": "x"}]],
    ["Abort", [1]], ["AskLoad", "x"], ["Train", 1, {"kind": "Nothing"}], ["Train", 1, {}], ["CancelTrain", 1.5],
    ["Trained", 1, {}], ["TrainingRefused", 1, ["SystemExit", "x"]], ["TrainingRefused", 1, [[], "x"]],
    ["Events", [[1, "x", ["Exception", "x"]]]], ["Events", [[2, "x"]]],
)  # fmt: skip


def behind_a_length(body: bytes) -> bytes:
    return struct.pack("!I", len(body)) + body


HUGE = [
    behind_a_length(msgpack.encode(["Submit"])[:-8] + b"\x92\xa6Submit" + claim + b"\x01")
    for claim in (b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff")
]
"""Arrays, maps, text and bytes that claim four thousand million entries, and a nest of arrays."""
HUGE.append(behind_a_length(b"\x91" * 1_000_000))
