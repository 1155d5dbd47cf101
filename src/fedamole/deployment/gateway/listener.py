"""The gateway's listener: TLS 1.3, with a certificate that may be renewed, and HTTP/1.1 within strict bounds."""

import asyncio
import logging
import socket
import ssl
import sys
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedamole.deployment.gateway.connection_slots import ConnectionSlot, ConnectionSlots
from fedamole.deployment.gateway.guard import HEAD_BYTES, RateLimitedLog

LOG = logging.getLogger("fedamole.gateway")

KEEP_ALIVE_S = 15
"""Longest wait for a complete head of a request, in seconds; longer than the 5 s after which httpx lets go."""

CLOSE_S = 2.0
"""Longest wait for the other side's end of TLS when a connection is closed, in seconds."""

CERTIFICATE_CHECK_S = 1.0
"""Seconds between two looks at the certificate's files."""

STOP_S = 10
"""Time for running calls to end when the gateway stops, in seconds."""


class Certificate:
    """The gateway's certificate and key. `context` is for new connections; running ones keep theirs."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """Load both files (PEM); ssl.SSLError or OSError where they cannot be used together."""
        self._files = certificate, key
        self._loaded = self._last = self._state()
        self.context = self._load()

    def reload(self) -> None:
        """Load the files again if they have changed and are no longer being written.

        Files that cannot be used leave the former certificate in use; that is logged once for each change.
        """
        state, last = self._state(), self._last
        self._last = state
        if state == self._loaded or state != last:
            return
        self._loaded = state
        try:
            self.context = self._load()
        except OSError as error:  # ssl.SSLError is one
            reason = error.strerror or type(error).__name__
            LOG.error("%s or %s cannot be used (%s): the former certificate stays in use", *self._files, reason)
        else:
            LOG.info("%s has changed: new connections are shown the new certificate", self._files[0])

    def _state(self) -> tuple[tuple[int, ...] | None, ...]:
        return tuple(map(_stamp, self._files))

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        certificate, key = self._files
        # With a password given, a key that is locked is an error and not a question at the terminal.
        context.load_cert_chain(certificate, key, password="")
        return context


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


class Protocol(H11Protocol):
    """uvicorn's HTTP/1.1, except that the keep-alive clock runs until the head of a request is complete.

    uvicorn stops it at the first byte and has none before the first request, so a caller that sends slowly, or
    nothing, would hold a connection for ever.
    """

    slot: ConnectionSlot
    slots: ConnectionSlots

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock with the connection."""
        super().connection_made(transport)
        self.slot.close = transport.abort
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        """Give the place back."""
        self.slots.release(self.slot)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes in; `handle_events` stops the clock when they complete the head of a request."""
        if self.transport.is_closing():
            return
        self.conn.receive_data(data)
        self.handle_events()

    def shutdown(self) -> None:
        """Close at once where no call is running: idle clients do not answer TLS's goodbye for seconds."""
        super().shutdown()
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


class ConnectionAcceptor:
    """Accepts connections on listening sockets: a place first, then TLS, then HTTP."""

    def __init__(self, server: "GatewayServer", listening: list[socket.socket]) -> None:
        """Begin to accept; within the event loop."""
        self._server, self._listening = server, listening
        loop = asyncio.get_running_loop()
        self._tasks = {loop.create_task(self._accept(sock)) for sock in listening}
        self._tasks.add(loop.create_task(self._watch()))

    def close(self) -> None:
        """Accept nobody more, and end handshakes that are under way."""
        for task in self._tasks:
            task.cancel()
        for sock in self._listening:
            asyncio.get_running_loop().call_soon(sock.close)  # once the loop no longer waits for it

    async def wait_closed(self) -> None:
        """Wait until that is done."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(CERTIFICATE_CHECK_S)
            self._server.certificate.reload()

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, (address, *_) = await loop.sock_accept(listening)
            except OSError as error:
                LOG.error("no connection can be accepted: %s", error.strerror)
                await asyncio.sleep(1)
                continue
            slot = self._server.slots.acquire(address)
            task = loop.create_task(self._handshake(connection, slot, address))
            slot.close = task.cancel  # type: ignore[assignment]
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            await asyncio.sleep(0)  # sock_accept does not wait while connections are queued

    async def _handshake(self, connection: socket.socket, slot: ConnectionSlot, address: str) -> None:
        """The TLS handshake; afterwards the connection is the protocol's."""
        server = self._server
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: server.protocol(slot),
                connection,
                ssl=server.certificate.context,
                ssl_handshake_timeout=server.slots.first_call_s,
                ssl_shutdown_timeout=CLOSE_S,
            )
        except ssl.SSLError as error:
            server.slots.release(slot)
            server.limited_log.warning("strangers", f"no TLS with {address}: {error.reason}")
        except OSError:  # gone again, or too slow
            server.slots.release(slot)


class GatewayServer(uvicorn.Server):
    """uvicorn's server, but with its own way to accept connections."""

    def __init__(
        self, config: uvicorn.Config, certificate: Certificate, slots: ConnectionSlots, limited_log: RateLimitedLog
    ) -> None:
        """Serve the application of `config`, whose TLS settings are not used."""
        super().__init__(config)
        self.certificate, self.slots, self.limited_log = certificate, slots, limited_log

    def protocol(self, slot: ConnectionSlot) -> Protocol:
        """The protocol of a new connection; calls find its place in their `state`."""
        protocol = Protocol(config=self.config, server_state=self.server_state, app_state={"slot": slot})
        protocol.slot, protocol.slots = slot, self.slots
        return protocol

    async def startup(self, sockets: Any = None) -> None:
        """Listen; SystemExit (1) with a line in the log where that is not possible."""
        await self.lifespan.startup()
        try:
            found = await asyncio.get_running_loop().getaddrinfo(
                self.config.host, self.config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            listening = [
                socket.create_server(address[:2], family=family, backlog=self.config.backlog)
                for family, address in sorted({(family, address) for family, _, _, _, address in found})
            ]
        except OSError as error:
            LOG.error("%s port %d cannot be listened on: %s", self.config.host, self.config.port, error.strerror)
            sys.exit(1)
        for sock in listening:
            sock.setblocking(False)
        self.servers = [ConnectionAcceptor(self, listening)]  # type: ignore[list-item]
        self.started = True


def listener(
    app: ASGIApp, host: str, port: int, certificate: Certificate, slots: ConnectionSlots, limited_log: RateLimitedLog
) -> GatewayServer:
    """A server that is not yet started, with nothing of uvicorn's in the answers and no line for a normal request."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=Protocol,
        ws="none",
        interface="asgi3",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=STOP_S,
        h11_max_incomplete_event_size=2 * HEAD_BYTES,
    )
    return GatewayServer(config, certificate, slots, limited_log)
