"""What the link between front-end and engine costs: a message, a round trip, many events, and what a death loses.

    python bench/link.py [--seconds 3] [--deaths 100] [--zeromq]

The engine is a stub in a second process that answers each request with one token, or, for throughput, gives 256
sequences a token each step. A death: a process hands one message over and is killed (SIGKILL) at once, or after some
time; counted is how often the message arrives. `--zeromq` does the same over DEALER and ROUTER sockets with the same
messages (`pip install pyzmq`; the product does not use it). Times in microseconds, median and 90th percentile.
"""

from __future__ import annotations

import argparse
import multiprocessing
import secrets
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from cluster.engine.request import EngineLoad, ModelLimits, Request, StoppingCriteria, TokenEvent
from cluster.link.engine_server import EngineServer
from cluster.link.messages import Events, Submit, decode, encode
from cluster.link.socket_link import SocketLink

LIMITS = ModelLimits(vocab_size=50304, max_context=4096, kv_capacity_tokens=1 << 20)
BATCH = 256


def request(name: str, tokens: int = 512) -> Request:
    return Request(request_id=name, token_ids=tuple(range(tokens)), stopping=StoppingCriteria(max_new_tokens=64))


def events_of(count: int) -> list[TokenEvent]:
    return [TokenEvent(request_id=f"{i:032x}", token_ids=(i * 37 % 50304,)) for i in range(count)]


class Stub:
    """An engine that answers at once. A request named "flood" begins a batch that never ends."""

    limits = LIMITS

    def __init__(self) -> None:
        self.waiting: list[Request] = []
        self.flood = False

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.flood)

    def submit(self, request: Request) -> None:
        self.flood |= request.request_id == "flood"
        self.waiting.append(request)

    def abort(self, request_ids: Sequence[str]) -> None:
        self.flood = False

    def abort_samples(self, samples: Sequence[tuple[str, int]]) -> None: ...

    def step(self) -> list[TokenEvent]:
        asked, self.waiting = self.waiting, []
        if self.flood:
            return events_of(BATCH)
        return [TokenEvent(request_id=each.request_id, token_ids=(7,)) for each in asked]

    def load(self) -> EngineLoad:
        return EngineLoad()

    prove = load

    def keep_alive(self) -> None: ...


def serve(parent: Connection, key: bytes) -> None:
    server = EngineServer(Stub(), key)
    parent.send(server.address)
    server.serve()


def timed(call: Callable[[], object], seconds: float) -> list[float]:
    call()
    end, times = time.perf_counter() + seconds, []
    while (start := time.perf_counter()) < end:
        call()
        times.append(time.perf_counter() - start)
    return times


def show(what: str, seconds: list[float]) -> None:
    micro = sorted(1e6 * value for value in seconds)
    print(f"{what:<44} {statistics.median(micro):9.1f} {micro[int(0.9 * len(micro))]:9.1f}", flush=True)


def messages(seconds: float) -> None:
    for name, message in (
        ("a request of 512 tokens", Submit((request("a" * 32),))),
        ("1 event", Events(events_of(1))),
        (f"{BATCH} events", Events(events_of(BATCH))),
    ):
        frame = encode(message)
        body = bytes(frame[4:])
        show(f"encode {name}, {len(body)} bytes", timed(lambda message=message: encode(message), seconds / 6))
        show(f"decode {name}", timed(lambda body=body: decode(body), seconds / 6))


def sockets(seconds: float) -> None:
    key = secrets.token_bytes(32)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, key), daemon=True)
    process.start()
    link, heard, count = SocketLink(here.recv(), key, 60.0), threading.Event(), [0]

    def take(events: Sequence[Any]) -> None:
        count[0] += len(events)
        heard.set()

    def ask() -> None:
        heard.clear()
        link.submit((request("a" * 32),))
        heard.wait()

    link.start(take, print)
    show("socket: submit and its token", timed(ask, seconds))
    link.submit((request("flood"),))
    time.sleep(0.2)
    before, start = count[0], time.perf_counter()
    time.sleep(seconds)
    print(f"socket: {(count[0] - before) / (time.perf_counter() - start):,.0f} events/s, {BATCH} a message", flush=True)
    link.abort(("flood",))
    link.close()
    process.kill()


def serve_zeromq(parent: Connection) -> None:
    import zmq

    router = zmq.Context().socket(zmq.ROUTER)
    parent.send(router.bind_to_random_port("tcp://127.0.0.1"))
    while True:
        peer, body = router.recv_multipart()
        flood = decode(body).requests[0].request_id == "flood"  # type: ignore[attr-defined]
        while flood:  # a full queue drops what goes to a ROUTER's peer: bounded by the heard
            router.send_multipart([peer, encode(Events(events_of(BATCH)))[4:]])
            flood = not router.poll(0)
        router.send_multipart([peer, encode(Events(events_of(1)))[4:]])


def zeromq(seconds: float) -> None:
    import zmq

    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve_zeromq, args=(there,), daemon=True)
    process.start()
    dealer = zmq.Context().socket(zmq.DEALER)
    dealer.connect(f"tcp://127.0.0.1:{here.recv()}")

    def ask() -> None:
        dealer.send(encode(Submit((request("a" * 32),)))[4:])
        decode(dealer.recv())

    show("ZeroMQ: submit and its token", timed(ask, seconds))
    dealer.send(encode(Submit((request("flood"),)))[4:])
    decode(dealer.recv())
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        count += len(decode(dealer.recv()).events)  # type: ignore[attr-defined]
    print(f"ZeroMQ: {count / (time.perf_counter() - start):,.0f} events/s, {BATCH} a message", flush=True)
    process.kill()


DYING_SOCKET = """
import os, signal, socket, sys, time
peer = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
peer.sendall(b"hello"); peer.recv(2); peer.sendall(bytes(200))
time.sleep(float(sys.argv[2])) if float(sys.argv[2]) else None
os.kill(os.getpid(), signal.SIGKILL)
"""
DYING_ZEROMQ = """
import os, signal, sys, time, zmq
peer = zmq.Context().socket(zmq.DEALER)
peer.connect("tcp://127.0.0.1:" + sys.argv[1])
peer.send(b"hello"); peer.recv(); peer.send(bytes(200))
time.sleep(float(sys.argv[2])) if float(sys.argv[2]) else None
os.kill(os.getpid(), signal.SIGKILL)
"""


def socket_death(delay: float) -> bool:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        child = subprocess.Popen([sys.executable, "-c", DYING_SOCKET, str(listener.getsockname()[1]), str(delay)])
        peer = listener.accept()[0]
        with peer:
            peer.recv(5)
            peer.sendall(b"go")
            child.wait()
            return len(peer.recv(4096)) == 200


def zeromq_death(delay: float) -> bool:
    import zmq

    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        port = router.bind_to_random_port("tcp://127.0.0.1")
        child = subprocess.Popen([sys.executable, "-c", DYING_ZEROMQ, str(port), str(delay)])
        router.send_multipart([router.recv_multipart()[0], b"go"])
        child.wait()
        return bool(router.poll(200))


def main() -> None:
    parser = argparse.ArgumentParser(description="cost of the link between front-end and engine")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--deaths", type=int, default=100)
    parser.add_argument("--zeromq", action="store_true")
    options = parser.parse_args()
    print(f"{'microseconds':<44} {'median':>9} {'p90':>9}")
    messages(options.seconds)
    sockets(options.seconds)
    if options.zeromq:
        zeromq(options.seconds)
    for delay in (0.0, 0.001):
        for name, death in (("socket", socket_death), ("ZeroMQ", zeromq_death))[: 1 + options.zeromq]:
            arrived = sum(death(delay) for _ in range(options.deaths))
            print(f"{name}: killed {1e3 * delay:g} ms after sending, arrived {arrived} of {options.deaths}", flush=True)


if __name__ == "__main__":
    main()
