"""The gateway's listener: TLS 1.3 with a renewable certificate, and HTTP/1.1 with strict limits."""

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
"""Maximum seconds to wait for a complete request header; longer than httpx's idle limit of 5 s."""

CLOSE_S = 2.0
"""Maximum seconds to wait for the peer's TLS close."""

CERTIFICATE_CHECK_S = 1.0
"""Seconds between checks of the certificate files."""

STOP_S = 10
"""Seconds for running calls to finish when the gateway stops."""


class Certificate:
    """The gateway's certificate and key. `context` is used for new connections; existing ones keep theirs."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """Load both files (PEM); ssl.SSLError or OSError if they cannot be used together."""
        self._files = certificate, key
        self._loaded = self._last = self._state()
        self.context = self._load()

    def reload(self) -> None:
        """Load the files again if they have changed and are completely written.

        If they cannot be used, the current certificate stays in use; this is logged once per change.
        """
        state, previous = self._state(), self._last
        self._last = state
        if state == self._loaded or state != previous:
            return
        self._loaded = state
        try:
            self.context = self._load()
        except OSError as error:  # includes ssl.SSLError
            reason = error.strerror or type(error).__name__
            LOG.error("%s or %s cannot be used (%s): the current certificate stays in use", *self._files, reason)
        else:
            LOG.info("%s has changed: new connections use the new certificate", self._files[0])

    def _state(self) -> tuple[tuple[int, ...] | None, ...]:
        return tuple(map(_stamp, self._files))

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        certificate, key = self._files
        # An empty password makes an encrypted key an error instead of a prompt on the terminal.
        context.load_cert_chain(certificate, key, password="")
        return context


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size


class Protocol(H11Protocol):
    """uvicorn's HTTP/1.1 protocol with a timeout until the header of each request is complete.

    uvicorn stops its keep-alive timer at the first byte and has none before the first request, so a caller that sends
    nothing, or sends slowly, would hold a connection forever.
    """

    slot: ConnectionSlot
    slots: ConnectionSlots

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer with the connection."""
        super().connection_made(transport)
        self.slot.close = transport.abort
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        """Release the slot."""
        self.slots.release(self.slot)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Receive bytes; `handle_events` stops the timer when they complete a request header."""
        if self.transport.is_closing():
            return
        self.conn.receive_data(data)
        self.handle_events()

    def shutdown(self) -> None:
        """Close at once if no call is running: idle clients take seconds to answer a TLS close."""
        super().shutdown()
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


class ConnectionAcceptor:
    """Accepts connections on listening sockets: acquires a slot, then does the TLS handshake, then HTTP."""

    def __init__(self, server: "GatewayServer", listening: list[socket.socket]) -> None:
        """Start accepting; call within the event loop."""
        self._server, self._listening = server, listening
        loop = asyncio.get_running_loop()
        self._tasks = {loop.create_task(self._accept(sock)) for sock in listening}
        self._tasks.add(loop.create_task(self._watch()))

    def close(self) -> None:
        """Stop accepting and cancel running handshakes."""
        for task in self._tasks:
            task.cancel()
        for sock in self._listening:
            asyncio.get_running_loop().call_soon(sock.close)  # after the loop has stopped waiting for it

    async def wait_closed(self) -> None:
        """Wait until all tasks have ended."""
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
                LOG.error("cannot accept a connection: %s", error.strerror)
                await asyncio.sleep(1)
                continue
            slot = self._server.slots.acquire(address)
            task = loop.create_task(self._handshake(connection, slot, address))
            slot.close = task.cancel  # type: ignore[assignment]
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            await asyncio.sleep(0)  # sock_accept does not yield while connections are queued

    async def _handshake(self, connection: socket.socket, slot: ConnectionSlot, address: str) -> None:
        """Do the TLS handshake; afterwards the protocol owns the connection."""
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
            server.limited_log.warning("strangers", f"TLS handshake with {address} failed: {error.reason}")
        except OSError:  # disconnected or timed out
            server.slots.release(slot)


class GatewayServer(uvicorn.Server):
    """uvicorn's server with its own way of accepting connections."""

    def __init__(
        self, config: uvicorn.Config, certificate: Certificate, slots: ConnectionSlots, limited_log: RateLimitedLog
    ) -> None:
        """Serve the application of `config`; its TLS settings are ignored."""
        super().__init__(config)
        self.certificate, self.slots, self.limited_log = certificate, slots, limited_log

    def protocol(self, slot: ConnectionSlot) -> Protocol:
        """Create the protocol of a new connection; calls find its slot in their `state`."""
        protocol = Protocol(config=self.config, server_state=self.server_state, app_state={"slot": slot})
        protocol.slot, protocol.slots = slot, self.slots
        return protocol

    async def startup(self, sockets: Any = None) -> None:
        """Start listening; logs an error and raises SystemExit(1) if that fails."""
        await self.lifespan.startup()
        try:
            addresses = await asyncio.get_running_loop().getaddrinfo(
                self.config.host, self.config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            listening = [
                socket.create_server(address[:2], family=family, backlog=self.config.backlog)
                for family, address in sorted({(family, address) for family, _, _, _, address in addresses})
            ]
        except OSError as error:
            LOG.error("cannot listen on %s port %d: %s", self.config.host, self.config.port, error.strerror)
            sys.exit(1)
        for sock in listening:
            sock.setblocking(False)
        self.servers = [ConnectionAcceptor(self, listening)]  # type: ignore[list-item]
        self.started = True


def listener(
    app: ASGIApp, host: str, port: int, certificate: Certificate, slots: ConnectionSlots, limited_log: RateLimitedLog
) -> GatewayServer:
    """Create a server, not yet started, that hides uvicorn in responses and logs no successful requests."""
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
