"""The ranks' store: as torch's own to whoever has the key, closed to everybody else, bounded in what it holds."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel import keyed_listener
from parallel.errors import CollectiveError
from parallel.keyed_listener import NONCE, exactly
from parallel.ranks import rendezvous_store
from parallel.ranks.rendezvous_store import HEAD, KeyedStore

HOST, KEY, LIMIT = "127.0.0.1", b"a key", timedelta(seconds=20)


@pytest.fixture
def server() -> Iterator[KeyedStore]:
    store = KeyedStore(HOST, 0, KEY, LIMIT, serve=True)
    yield store
    store.close()


def port_of(store: KeyedStore) -> int:
    assert store._server is not None
    return store._server.port


@pytest.fixture
def store(server: KeyedStore) -> Iterator[KeyedStore]:
    store = KeyedStore(HOST, port_of(server), KEY, LIMIT)
    yield store
    store.close()


def test_it_answers_as_torchs_own_store_does(store: KeyedStore) -> None:
    torchs = dist.HashStore()
    for each in (store, torchs):
        each.set("a", "1")
        assert each.get("a") == b"1" and each.add("n", 2) == 2 and each.add("n", -5) == -3
        assert each.check(["a", "n"]) and not each.check(["a", "b"])
        assert each.delete_key("a") and not each.delete_key("a") and not each.check(["a"])
        assert each.compare_set("c", "", "first") == b"first"
        assert each.compare_set("c", "other", "second") == b"first"
        assert each.compare_set("c", "first", "second") == b"second" and each.get("c") == b"second"


def test_a_value_is_waited_for_and_a_limit_is_kept(server: KeyedStore, store: KeyedStore) -> None:
    threading.Timer(0.2, lambda: server.set("late", b"here")).start()
    store.wait(["late"])
    assert store.get("late") == b"here"
    with pytest.raises(CollectiveError, match="waited 0.1 s for the ranks' key 'never', which nobody set"):
        store.wait(["never"], timedelta(seconds=0.1))


def test_one_that_waits_holds_up_no_other_thread(server: KeyedStore, store: KeyedStore) -> None:
    waiting = threading.Thread(target=store.wait, args=(["later"],))
    waiting.start()
    store.set("other", "1")
    assert store.get("other") == b"1" and waiting.is_alive()
    server.set("later", "")
    waiting.join(20.0)
    assert not waiting.is_alive()


def test_a_process_group_is_built_on_it(server: KeyedStore) -> None:
    results: list[float] = []

    def rank(number: int) -> None:
        prefix = dist.PrefixStore("gloo", dist.PrefixStore("all", KeyedStore(HOST, port_of(server), KEY, LIMIT)))
        group: Any = dist.ProcessGroupGloo(prefix, number, 2, LIMIT)
        tensor = torch.tensor([number + 1.0])
        group.allreduce([tensor]).wait()
        results.append(tensor.item())

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    assert results == [3.0, 3.0]


def test_another_key_is_refused(server: KeyedStore) -> None:
    with pytest.raises(CollectiveError, match="has another key"):
        KeyedStore(HOST, port_of(server), b"another", LIMIT)
    server.set("still", "here")
    assert server.get("still") == b"here"


def test_a_server_without_the_key_is_not_believed() -> None:
    with socket.create_server((HOST, 0)) as false:

        def answer() -> None:
            peer, _ = false.accept()
            with peer:
                peer.sendall(bytes(NONCE))
                peer.recv(2 * NONCE)
                peer.sendall(bytes(NONCE))
                time.sleep(0.2)

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(CollectiveError, match="has another key"):
            KeyedStore(HOST, false.getsockname()[1], KEY, LIMIT)


@pytest.mark.parametrize(
    "junk", [b"", b"\xff" * 4096, b"GET / HTTP/1.1\r\n\r\n", HEAD.pack(0, 1, 1) + b"ab", bytes(NONCE * 2)]
)
def test_strangers_change_nothing(server: KeyedStore, junk: bytes) -> None:
    with socket.create_connection((HOST, port_of(server)), 20.0) as stranger:
        with suppress(OSError):  # the server resets what it has not read all of
            stranger.sendall(junk)
            stranger.shutdown(socket.SHUT_WR)
            while stranger.recv(4096):
                pass
    server.set("a", "1")
    assert server.get("a") == b"1" and not server.check(["ab", "\0"])


def test_strangers_who_say_nothing_hold_up_nobody(server: KeyedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyed_listener, "PROOF_S", 600.0)  # the oldest go before their time
    monkeypatch.setattr(keyed_listener, "POLITE_S", 0.01)
    idle = [socket.create_connection((HOST, port_of(server)), 20.0) for _ in range(5 * keyed_listener.MOST_STRANGERS)]
    store = KeyedStore(HOST, port_of(server), KEY, LIMIT)
    store.set("a", "1")
    assert store.get("a") == b"1"
    for each in idle:
        each.close()


def test_what_it_holds_is_bounded(store: KeyedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous_store, "STORE_BYTES", 1000)
    store.set("a", bytes(900))
    with pytest.raises(CollectiveError, match="takes no more"):
        store.set("b", bytes(900))
    store.set("a", bytes(10))
    store.set("b", bytes(900))


def test_a_store_that_is_gone_is_said(server: KeyedStore, store: KeyedStore) -> None:
    server.close()
    with pytest.raises(CollectiveError, match="rank 0 ended|was not reached|has another key"):
        store.set_timeout(timedelta(seconds=0.3))
        store.get("a")


def stranger_at(server: KeyedStore) -> tuple[socket.socket, bytes]:
    peer = socket.create_connection((HOST, port_of(server)), 20.0)
    return peer, exactly(peer, NONCE)


def answer_to(peer: socket.socket, said: bytes) -> bytes:
    """All that comes back before the connection ends."""
    with peer, suppress(OSError):
        peer.sendall(said)
        got = b""
        while part := peer.recv(4096):
            got += part
        return got
    return b""


def test_what_a_rank_once_proved_is_no_proof_again(server: KeyedStore) -> None:
    """Somebody who listens on the way plays a rank's words back, its question among them."""
    with socket.create_server((HOST, 0)) as way:
        heard: list[bytes] = []

        def between() -> None:
            rank, real = way.accept()[0], socket.create_connection((HOST, port_of(server)), 20.0)
            with rank, real:
                rank.sendall(exactly(real, NONCE))
                heard.append(exactly(rank, 2 * NONCE))
                real.sendall(heard[0])
                rank.sendall(exactly(real, NONCE))

        thread = threading.Thread(target=between)
        thread.start()
        KeyedStore(HOST, way.getsockname()[1], KEY, LIMIT).close()
        thread.join(20.0)
    peer, _ = stranger_at(server)
    assert answer_to(peer, heard[0]) in (b"", bytes(NONCE))


def test_the_servers_own_words_open_nothing(server: KeyedStore) -> None:
    """Questions are given back as one's own, and what one connection says is said on another."""
    first, asked = stranger_at(server)
    second, other = stranger_at(server)
    assert answer_to(first, asked + other) in (b"", bytes(NONCE))
    assert answer_to(second, asked + asked) in (b"", bytes(NONCE))
    server.set("still", "here")


def test_a_stranger_who_speaks_byte_by_byte_has_one_limit_for_all(
    server: KeyedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyed_listener, "PROOF_S", 0.3)
    peer, _ = stranger_at(server)
    sent = 0
    with peer, suppress(OSError):
        while sent < 2 * NONCE:
            sent += peer.send(b"x")
            time.sleep(0.05)
    assert sent < 2 * NONCE


def in_vain(store: KeyedStore) -> None:
    with suppress(CollectiveError):
        store.get("never")


def ours() -> tuple[int, int]:
    """Open files of this process, threads of stores."""
    return len(os.listdir("/proc/self/fd")), sum(thread.name == "store" for thread in threading.enumerate())


def test_fifty_lives_leave_neither_threads_nor_files() -> None:
    before = ours()
    for life in range(50):
        stores = [KeyedStore(HOST, 0, KEY, LIMIT, serve=True)]
        stores += [KeyedStore(HOST, port_of(stores[0]), KEY, LIMIT) for _ in range(2)]
        waiting = threading.Thread(target=in_vain, args=stores[-1:])
        waiting.start()
        with socket.create_connection((HOST, port_of(stores[0])), 20.0):
            assert stores[1].add("n", life) == life
            for store in (*stores, *stores):  # twice does no harm
                store.close()
        waiting.join(20.0)
    end = time.monotonic() + 20.0
    while any(now > then for now, then in zip(ours(), before, strict=True)) and time.monotonic() < end:
        time.sleep(0.01)
    assert all(now <= then for now, then in zip(ours(), before, strict=True)), "fewer: of an earlier test's"


def test_a_store_that_was_closed_says_so_at_once(store: KeyedStore) -> None:
    store.close()
    with pytest.raises(CollectiveError, match="was closed here"):
        store.set("a", "1")


def test_a_port_that_is_taken_leaves_nothing_behind_and_is_named(server: KeyedStore) -> None:
    before = ours()
    with pytest.raises(OSError, match="in use"):
        KeyedStore(HOST, port_of(server), KEY, LIMIT, serve=True)
    assert ours() == before


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_it_listens_on_an_ipv6_address_too() -> None:
    with (
        closing(KeyedStore("::1", 0, KEY, LIMIT, serve=True)) as server,
        closing(KeyedStore("::1", port_of(server), KEY, LIMIT)) as rank,
    ):
        rank.set("a", "1")
        assert server.get("a") == b"1"
