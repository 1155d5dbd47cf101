"""HTTP connections with time limits, and the socket that the server listens on."""

import asyncio
import ipaddress
import socket
import time
from typing import Any

from typing_extensions import override
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedamole.errors import ConfigError


class HttpConnection(H11Protocol):
    """An HTTP/1.1 connection of uvicorn that is closed when the other side keeps the server waiting.

    uvicorn alone waits without limit for the head of a request and for a caller that does not read its answer. h11
    limits the size of a head.
    """

    head_seconds = 10.0
    """Time limit for the head of a request, counted from the start of the connection or of the head."""
    stall_seconds = 30.0
    """Time after which a caller that reads nothing of an answer is disconnected."""
    max_idle = 256
    """Maximum number of connections without a request in progress. Beyond it, the oldest is closed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Pass on uvicorn's arguments."""
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._opened = time.monotonic()

    @property
    def idle(self) -> bool:
        """Whether no request is in progress."""
        return self.cycle is None or self.cycle.response_complete

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        idle = [other for other in self.connections if isinstance(other, HttpConnection) and other.idle]
        if len(idle) > self.max_idle:
            min(idle, key=lambda other: other._opened).abort()
        self._head_timer = self.loop.call_later(self.head_seconds, self.abort)

    @override
    def data_received(self, data: bytes) -> None:
        try:
            super().data_received(data)
        except Exception:  # h11 raises on invalid data after an answer; asyncio would log a traceback
            self.abort()
        if not self.idle:
            self._cancel_head_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_seconds, self.abort)

    @override
    def send_400_response(self, msg: str) -> None:
        # A request in progress on this connection ends without an answer, and without an error in the log.
        if not self.idle:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        super().send_400_response(msg)

    @override
    def pause_writing(self) -> None:
        super().pause_writing()
        self._cancel_stall_timer()
        self._stall_timer = self.loop.call_later(self.stall_seconds, self.abort)

    @override
    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_stall_timer()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._cancel_head_timer()
        self._cancel_stall_timer()

    def _cancel_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _cancel_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def abort(self) -> None:
        """Close the connection at once."""
        self.transport.abort()


def is_loopback(host: str) -> bool:
    """Return whether a host name or address is this machine's loopback, which other machines cannot reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address; port 0 picks a free port. Raises ConfigError if the bind fails."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        text = f"cannot listen on {host}:{port}: {error.strerror}; choose another --port or --host"
        raise ConfigError(text) from error
    return bound
