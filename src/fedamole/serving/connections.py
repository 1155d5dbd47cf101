"""Connections: who may open one, and how long one may take over what it has to do."""

import asyncio
import ipaddress
import socket
import time
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from fedamole.errors import ConfigError


class Door(H11Protocol):
    """uvicorn's connection over h11, which bounds a request's head. It is cut when it keeps the server waiting.

    uvicorn itself waits without limit for the head of a request, and for a caller that reads nothing of its answer.
    """

    head_seconds = 10.0
    """Longest time in which the head of a request has to be here, from when the connection or the head begins."""
    stall_seconds = 30.0
    """Longest time in which a caller takes nothing of an answer that is being sent."""
    most_idle = 256
    """Most connections without a request under way; the oldest is cut when there is one more."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what uvicorn gives to every connection."""
        super().__init__(*args, **kwargs)
        self._head: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._opened = time.monotonic()

    @property
    def idle(self) -> bool:
        """Whether no request is under way."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        idle = [one for one in self.connections if isinstance(one, Door) and one.idle]
        if len(idle) > self.most_idle:
            min(idle, key=lambda one: one._opened).cut()
        self._head = self.loop.call_later(self.head_seconds, self.cut)

    def data_received(self, data: bytes) -> None:
        """Take more of a request."""
        try:
            super().data_received(data)
        except Exception:  # what h11 raises on nonsense after an answer; asyncio would log a traceback for it
            self.cut()
        if not self.idle:
            self._forget_head()
        elif self._head is None:
            self._head = self.loop.call_later(self.head_seconds, self.cut)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP. A request that it came after gets no answer any more, which is no error."""
        if not self.idle:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        super().send_400_response(msg)

    def pause_writing(self) -> None:
        """Begin to wait for a caller that reads too slowly."""
        super().pause_writing()
        self._forget_stall()
        self._stall = self.loop.call_later(self.stall_seconds, self.cut)

    def resume_writing(self) -> None:
        """Go on sending."""
        super().resume_writing()
        self._forget_stall()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more."""
        super().connection_lost(exc)
        self._forget_head()
        self._forget_stall()

    def _forget_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _forget_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def cut(self) -> None:
        """End the connection at once."""
        self.transport.abort()


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own, which nobody else can reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on an address; port 0 takes a free one. ConfigError where that cannot be."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        text = f"cannot listen on {host}:{port}: {error.strerror}; choose another --port or --host"
        raise ConfigError(text) from error
    return found
