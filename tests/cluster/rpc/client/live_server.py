"""A server of its own thread and port for blocking clients, which may be lost and come back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cluster.frontend.frontend import Frontend
from cluster.frontend.requests.call import FrontendConfig
from cluster.link.local_link import LocalLink
from cluster.rpc.server import build_server
from tests.cluster.frontend.fakes import CODEC, FakeEngine


class Live:
    """A fake engine behind a real port. `lose` and `come_back` from any thread."""

    def __init__(self, security: Any = None, engine: Mapping[str, Any] | None = None, **config: Any) -> None:
        self._engine, self._security, self._config = {"step_seconds": 0.002, **(engine or {})}, security, config
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._stop: Any = None
        self.frontend: Any = None
        self.port = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def come_back(self) -> None:
        self._do(self._serve())

    def lose(self) -> None:
        self._do(self._stop())

    def open_requests(self) -> int:
        return int(self.frontend.num_open)

    def _do(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    async def _serve(self) -> None:
        link = LocalLink(FakeEngine(**self._engine))
        frontend = Frontend(link, codec=CODEC, config=FrontendConfig(**self._config))
        frontend.start()
        server = build_server(frontend, f"127.0.0.1:{self.port}", security=self._security)
        await server.start()
        self.port, self.frontend = server.port, frontend

        async def stop() -> None:
            await server.stop(0)
            await frontend.close()

        self._stop = stop

    def __enter__(self) -> Live:
        self._thread.start()
        self.come_back()
        return self

    def __exit__(self, *exc: object) -> None:
        self.lose()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)


@contextmanager
def live(**settings: Any) -> Iterator[Live]:
    with Live(**settings) as server:
        yield server
