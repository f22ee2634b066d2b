"""Control.Restart over the wire, and what GetServerInfo and GetLoad say of several replicas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from cluster.frontend.fleet.fleet import Restarted
from cluster.frontend.frontend import Frontend
from cluster.frontend.readiness import Readiness
from cluster.frontend.requests.call import FrontendConfig
from cluster.link.local_link import LocalLink
from cluster.request_errors import Draining
from cluster.rpc.client.client import AsyncClient
from cluster.rpc.server import build_server
from cluster.rpc.services.control_service import Restart
from tests.cluster.frontend.fakes import CODEC, FakeEngine
from tests.cluster.frontend.harness import run
from tests.cluster.rpc.harness import refused, service
from tp_decoders.protocol import control_pb2


@asynccontextmanager
async def two_replicas(restart: Restart | None = None) -> AsyncIterator[tuple[Frontend, AsyncClient]]:
    links = [LocalLink(FakeEngine()), LocalLink(FakeEngine())]
    frontend = Frontend(links, codec=CODEC, config=FrontendConfig(recovery_seconds=60.0))
    readiness = Readiness(frontend)
    server = build_server(frontend, "127.0.0.1:0", readiness=readiness, restart=restart)
    frontend.start()
    await readiness.prove()
    await server.start()
    try:
        async with AsyncClient(f"127.0.0.1:{server.port}") as client:
            await client.ready()
            yield frontend, client
    finally:
        await server.stop(1.0)
        await frontend.close()


def test_a_restart_is_given_the_grace_time_and_answered_with_what_was_done() -> None:
    given: list[float] = []

    async def restart(grace_s: float) -> Restarted:
        given.append(grace_s)
        if grace_s == 1.0:
            raise Draining("the server is stopping")
        return Restarted(2, 3)

    async def main() -> None:
        async with two_replicas(restart) as (_, client):
            ask = control_pb2.RestartRequest
            done = await client.call(client.control.Restart, ask(grace_seconds=0.0))
            assert (done.replicas, done.handed_over) == (2, 3)
            await client.call(client.control.Restart, ask())
            assert given == [0.0, 30.0]
            wrong = client.call(client.control.Restart, ask(grace_seconds=-1.0))
            await refused(wrong, grpc.StatusCode.INVALID_ARGUMENT, "grace_seconds")
            stopping = client.call(client.control.Restart, ask(grace_seconds=1.0))
            await refused(stopping, grpc.StatusCode.UNAVAILABLE, "stopping")

    run(main())


def test_a_server_over_engines_that_it_does_not_run_refuses_to_restart_them() -> None:
    async def main() -> None:
        async with service() as s:
            asked = s.client.call(s.client.control.Restart, control_pb2.RestartRequest())
            await refused(asked, grpc.StatusCode.FAILED_PRECONDITION, "does not run its engines' processes")
            assert len((await s.client.server_info()).replicas) == 1
            assert not (await s.client.load()).replicas, "of one the sums are all there is to say"

    run(main())


def test_which_replica_is_out_and_why_is_told_while_the_server_serves() -> None:
    async def main() -> None:
        async with two_replicas() as (frontend, client):
            answers = [client.generate([[i]], stopping={"max_new_tokens": 4}) for i in range(4)]
            await asyncio.gather(*answers)
            frontend.fault("rank 0 on node-b: its process died", 1)
            info = await client.server_info()
            assert info.state == control_pb2.SERVING_STATE_SERVING and info.ready
            assert info.fault == "replica 1: rank 0 on node-b: its process died"
            first, second = info.replicas
            assert (first.has_engine, first.ready, first.reason) == (True, True, "")
            assert (second.has_engine, second.ready) == (False, False) and "its process died" in second.reason
            assert first.routed_by_load + second.routed_by_load == 4
            load = await client.load()
            assert [each.replica for each in load.replicas] == [0] and load.steps == load.replicas[0].load.steps

    run(main())
