"""One connection's messages: whole, in order, written at once where the other side reads, and never waited for."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from cluster.link.messages import Fault
from cluster.link.wire import Wire


@pytest.fixture
def ends() -> Iterator[tuple[Wire, Wire]]:
    """Two wires of one connection; the second one's kernel buffers are small."""
    mine, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    wires = Wire(mine, "mine"), Wire(theirs, "theirs")
    yield wires
    for wire in wires:
        wire.close()


def cause(wire: Wire) -> str:
    message = wire.receive()
    assert isinstance(message, Fault)
    return message.cause


def test_what_is_sent_now_has_left_this_process_when_that_returns(ends: tuple[Wire, Wire]) -> None:
    mine, theirs = ends
    assert mine.send_now(Fault("at once"))
    assert cause(theirs) == "at once"


def test_messages_keep_their_order_and_their_bytes_where_the_peer_is_slow(ends: tuple[Wire, Wire]) -> None:
    mine, theirs = ends
    sizes = [10, 3_000_000, 10, 200_000, 10, 2_000_000, 10]  # some fill the kernel's buffers
    for number, size in enumerate(sizes):
        if number % 3 == 2:
            mine.send(Fault(f"{number} {'x' * size}"))
        elif number:
            assert not mine.send_now(Fault(f"{number} {'x' * size}")), "nobody reads"
        else:
            assert mine.send_now(Fault(f"{number} {'x' * size}"))
    written = mine.flush()
    assert not written.is_set()
    assert [cause(theirs) for _ in sizes] == [f"{number} {'x' * size}" for number, size in enumerate(sizes)]
    assert written.wait(60) and mine.send_now(Fault("again at once"))
    assert cause(theirs) == "again at once"


def test_threads_that_send_at_the_same_time_do_not_mix_their_bytes(ends: tuple[Wire, Wire]) -> None:
    mine, theirs = ends
    heard: list[str] = []
    reader = threading.Thread(target=lambda: heard.extend(cause(theirs) for _ in range(400)))
    reader.start()

    def send(name: str) -> None:
        for number in range(200):
            (mine.send_now if number % 2 else mine.send)(Fault(f"{name} {number} {'x' * (number * 97)}"))

    senders = [threading.Thread(target=send, args=(name,)) for name in "ab"]
    for thread in senders:
        thread.start()
    for thread in (*senders, reader):
        thread.join(60)
    for name in "ab":
        assert [words.split()[1] for words in heard if words.startswith(name)] == [str(i) for i in range(200)]


def test_a_wire_whose_peer_is_gone_drops_what_is_sent_and_nobody_waits(ends: tuple[Wire, Wire]) -> None:
    mine, theirs = ends
    theirs.close()
    assert not mine.send_now(Fault("nobody"))
    assert mine.flush().wait(60)
    mine.close()
    assert not mine.send_now(Fault("nobody")) and mine.flush().is_set()
