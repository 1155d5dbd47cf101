"""The uvicorn server that runs the HTTP API."""

import asyncio
import logging
import socket
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from typing_extensions import override

from fedamole.serving.connections import HttpConnection
from fedamole.serving.engine import error_location
from fedamole.serving.service import Service
from fedamole.terminal import printable

log = logging.getLogger(__name__)

KEEP_ALIVE = 5
"""Seconds for which a connection stays open between two requests."""


POLL = 0.1
"""Seconds between two checks for a second signal while open requests finish."""


class LogErrors:
    """ASGI middleware that logs an exception in one line, without a traceback or the message.

    Starlette raises exceptions again after it has answered with status 500.
    """

    def __init__(self, app: ASGIApp) -> None:
        """Wrap an application."""
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        try:
            await self.app(scope, receive, send)
        except Exception as error:
            log.error("a request failed: %s", printable(error_location(error)))


class HttpServer(uvicorn.Server):
    """A uvicorn server that finishes open requests when it shuts down, then stops the engines."""

    def __init__(self, service: Service, certs: Path | None = None, drain_seconds: float = 0) -> None:
        """Serve over TLS with a folder written by `fedamole certs`, or without encryption if `certs` is None.

        When the server shuts down, open requests have `drain_seconds` to finish; new ones are refused. After that, or
        after a second signal, they end with an error.
        """
        tls: dict[str, Any] = {}
        if certs is not None:
            tls = {"ssl_certfile": certs / "server.crt", "ssl_keyfile": certs / "server.key"}
        super().__init__(
            uvicorn.Config(
                LogErrors(service.app),
                http=HttpConnection,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="critical",
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=5,
                **tls,
            )
        )
        self.engines = service.models.engines
        self.drain_seconds = drain_seconds

    @override
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        drained = asyncio.gather(*(asyncio.to_thread(engine.drain, self.drain_seconds) for engine in self.engines))
        while not drained.done() and not self.force_exit:
            await asyncio.wait([drained], timeout=POLL)
        for engine in self.engines:
            await asyncio.to_thread(engine.stop)
        await drained
        await super().shutdown(sockets)
