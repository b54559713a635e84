"""The application, and the process that serves it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import uuid
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from types import FrameType
from typing import Final

import h11
import uvicorn
from fastapi import FastAPI
from kubernetes.aio.config import ConfigException
from uvicorn.protocols.http.h11_impl import H11Protocol

from claas_operator.shim import docs, problems
from claas_operator.shim.cluster import connect_cluster
from claas_operator.shim.door import Door
from claas_operator.shim.http import Envelope, install_handlers
from claas_operator.shim.problems import Problem
from claas_operator.shim.routes import router
from claas_operator.shim.settings import ShimSettings

log = logging.getLogger(__name__)

GRACE_SECONDS: Final = 10  # for answers that are on their way when SIGTERM comes; nobody who waits is kept
BACKLOG: Final = 2048
HEADERS_SECONDS: Final = 10  # for a call's headers, from its first byte; a fresh connection's from its beginning


def make_app(settings: ShimSettings, *, started: Callable[[Door], None] = lambda door: None) -> FastAPI:
    """The application. Its lifespan connects to the API server; `started` is told its `Door` then."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        door = Door(settings, await connect_cluster())
        app.state.door = door
        await door.start()
        gc.collect()
        gc.freeze()  # modules and models stay: to look through them again would hold up every caller for 65 ms
        started(door)
        try:
            yield
        finally:
            door.leave()
            await door.stop()

    app = FastAPI(
        title="CLaaS",
        lifespan=lifespan,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
    )
    app.include_router(router)
    docs.install(app)
    install_handlers(app)
    app.add_middleware(Envelope)
    return app


class _Http(H11Protocol):
    """h11 bounds a call's headers, httptools does not. What is no HTTP is refused in our words, too."""

    _too_late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A connection that asks nothing is ended."""
        super().connection_made(transport)
        self._await_headers()

    def data_received(self, data: bytes) -> None:
        """When a call comes is when it was asked for; among many, its turn may come later."""
        self.app_state = {**self.app_state, "asked_at": datetime.now(UTC)}  # uvicorn copies it into the call's scope
        super().data_received(data)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is awaited any more."""
        super().connection_lost(exc)
        if self._too_late is not None:
            self._too_late.cancel()

    def _await_headers(self) -> None:
        """The time for them runs while they are incomplete, however often a byte of them comes."""
        if self.conn.their_state is not h11.IDLE:
            if self._too_late is not None:
                self._too_late.cancel()
            self._too_late = None
        elif self._too_late is None:
            self._too_late = self.loop.call_later(HEADERS_SECONDS, self.transport.close)

    def send_400_response(self, msg: str) -> None:
        """A problem, as every answer."""
        request_id = uuid.uuid4().hex
        answer = Problem(problems.MALFORMED, "the call is not HTTP/1.1", fix="see RFC 9112").answer(request_id)
        headers = [*answer.raw_headers, (b"x-request-id", request_id.encode())]
        for event in (
            h11.Response(status_code=400, headers=[*headers, (b"connection", b"close")], reason=b"Bad Request"),
            h11.Data(data=bytes(answer.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class _Server(uvicorn.Server):
    """On SIGTERM, whoever waits is told at once where to ask again; uvicorn alone would wait for them to end."""

    door: Door | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal ends it in good order, the second at once. (uvicorn's own raises it again at the end.)"""
        self.force_exit, self.should_exit = self.should_exit, True
        if self.door is not None:
            asyncio.get_running_loop().call_soon_threadsafe(self.door.leave)


def run(settings: ShimSettings, *, host: str = "127.0.0.1", port: int = 8080, log_level: str = "INFO") -> int:
    """Serves until SIGTERM or SIGINT, as the identity of the Pod or of KUBECONFIG. The process's exit status."""
    from claas_operator.shim.logs import log_as_json

    log_as_json(log_level)
    server: _Server

    def started(door: Door) -> None:
        server.door = door
        log.info("serving", extra={"host": host, "port": port, "auth": settings.auth.mode})

    config = uvicorn.Config(
        make_app(settings, started=started),
        host=host,
        port=port,
        http=_Http,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    server = _Server(config)
    try:
        server.run()
    except ConfigException:
        log.error("no cluster: set KUBECONFIG, or run in a Pod")
        return 1
    return 0 if server.started else 1
