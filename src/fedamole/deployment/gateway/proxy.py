"""The gateway's ASGI application: checks each call and forwards allowed ones to the SuperLink."""

import asyncio
import json
import logging
import ssl
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import httpx
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from fedamole.deployment.flower.messages import push_fault
from fedamole.deployment.gateway.connection_slots import MAX_REGISTERED, ConnectionSlots
from fedamole.deployment.gateway.guard import (
    BODY_LIMITS,
    PUSH_MESSAGES,
    Budget,
    RateLimitedLog,
    RefusedError,
    check_head,
    check_signature,
)
from fedamole.deployment.security.roster import Roster

LOG = logging.getLogger("fedamole.gateway")

HEALTH = b"/health"

TOKEN_HEADER = "x-fedamole-gateway"
"""Header with the gateway's token for the SuperLink."""

FORWARDED = frozenset((b"accept", b"accept-encoding", b"content-type", b"user-agent"))
"""Request headers that are forwarded to the SuperLink, in addition to those that start with `flwr-`."""

HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)
"""Response headers that apply to one connection and are not forwarded."""

IDLE_S = 30.0
"""Maximum seconds without data transfer, the timeout of Flower's client for a call."""

CALL_S = 600.0
"""Maximum seconds for one call."""

SUPERLINK_KEEP_ALIVE_S = 4.0
"""Shorter than the 5 s after which the SuperLink closes idle connections, so calls do not use closed ones."""

HEALTH_S = 1.0
"""Timeout of a TCP connection to the SuperLink in seconds, and validity of its result."""

CHUNK_BYTES = 2**18
"""Bytes of a response that are forwarded at once: 1.5 times as fast as TLS's pieces of 16 KiB."""


def answer_headers(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the SuperLink's headers without those of its connection to the gateway."""
    pairs = [(name.lower(), value) for name, value in headers]
    connection_headers = {
        word.strip().lower() for name, value in pairs if name == b"connection" for word in value.split(b",")
    }
    return [(name, value) for name, value in pairs if name not in HOP_BY_HOP and name not in connection_headers]


def request_headers(request: Request, token: str, length: int) -> list[tuple[bytes, bytes]]:
    """Return the headers for the SuperLink: Flower's, content length, caller's address, and token if any."""
    headers = [(name, value) for name, value in request.headers.raw if name in FORWARDED or name.startswith(b"flwr-")]
    headers += [(b"content-length", b"%d" % length), (b"x-forwarded-for", address(request).encode())]
    return [*headers, (TOKEN_HEADER.encode(), token.encode())] if token else headers


def address(request: Request) -> str:
    """Return the IP address of the caller."""
    return request.client.host if request.client else "unknown"


class Health:
    """Checks, at most once a second, whether the SuperLink accepts connections."""

    def __init__(self, host: str, port: int) -> None:
        """Check this address."""
        self._target = host, port
        self._lock = asyncio.Lock()
        self._asked, self._up = float("-inf"), False

    async def up(self) -> bool:
        """Return whether a TCP connection succeeds within a second; a result is valid for one second."""
        async with self._lock:
            loop = asyncio.get_running_loop()
            if loop.time() - self._asked >= HEALTH_S:
                self._up = await self._connects()
                self._asked = loop.time()
            return self._up

    async def _connects(self) -> bool:
        try:
            async with asyncio.timeout(HEALTH_S):
                _, writer = await asyncio.open_connection(*self._target)
        except OSError:  # includes TimeoutError
            return False
        writer.close()
        return True


@dataclass
class Gateway:
    """The ASGI application: forwards each call to the SuperLink at `address` and streams the response back.

    `address` is HOST:PORT. `limits` bounds the body of each allowed call, `budget` the size of all bodies in transit;
    `idle_s` and `call_s` bound the time of a call, see `IDLE_S` and `CALL_S`.
    """

    superlink: httpx.AsyncClient
    address: str
    roster: Roster
    budget: Budget = field(default_factory=Budget)
    slots: ConnectionSlots = field(default_factory=ConnectionSlots)
    limited_log: RateLimitedLog = field(default_factory=lambda: RateLimitedLog(LOG))
    limits: dict[bytes, int] = field(default_factory=lambda: dict(BODY_LIMITS))
    token: str = field(default="", repr=False)
    idle_s: float = IDLE_S
    call_s: float = CALL_S

    def __post_init__(self) -> None:
        """Set up the health check of the SuperLink."""
        target = urlsplit(f"//{self.address}")
        assert target.hostname is not None
        assert target.port is not None
        self._health = Health(target.hostname, target.port)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward an allowed call; refuse any other, close its connection and log one line."""
        request = Request(scope, receive)
        started = False
        caller = ""

        async def sending(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        word = ""
        try:
            if self._is_health_request(request):
                await self._send_health(request, sending)
                return
            path = scope["raw_path"]
            length = check_head(scope["method"], path, scope["query_string"], request.headers, self.limits)
            client = check_signature(request.headers, self.roster, datetime.now(UTC))
            caller = client.name
            self.slots.authenticate(scope["state"]["slot"], caller, len(self.roster))
            with self.budget.reserved(caller, length):
                await self._forward(request, length, sending)
            return
        except RefusedError as error:
            status, word, why = error.status, error.word, error.why
        except ClientDisconnect:
            return
        except TimeoutError:
            status, why = 504, "the call took too long"
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            status, why = 503, f"cannot reach the SuperLink: {error!r}"
        except httpx.HTTPError as error:
            status, why = 502, f"the connection to the SuperLink failed: {error!r}"
        except asyncio.CancelledError:
            status, why = 503, "the gateway is stopping"  # uvicorn would send 500, which clients do not retry
        path = scope["raw_path"][:100].decode("ascii", "backslashreplace")
        who = f"{caller} at {address(request)}" if caller else address(request)
        self.limited_log.warning(caller or "strangers", f"{status} {request.method[:20]} {path} from {who}: {why}")
        if not started:  # otherwise the response stays incomplete: uvicorn closes the connection and the client retries
            await _answer(status, {"error": word} if word else None)(scope, receive, send)

    def _is_health_request(self, request: Request) -> bool:
        return request.method == "GET" and request.scope["raw_path"] == HEALTH and not request.scope["query_string"]

    async def _send_health(self, request: Request, send: Send) -> None:
        up = await self._health.up()
        answer = _answer(200, {"status": "ok"}) if up else _answer(503, {"status": "superlink-down"})
        await answer(request.scope, request.receive, send)

    async def _forward(self, request: Request, length: int, send: Send) -> None:
        """Stream the call to the SuperLink and the response back; push-messages is read completely and checked first.

        Raises RefusedError, TimeoutError, ClientDisconnect (the caller has disconnected) and httpx.HTTPError.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + self.call_s
        async with asyncio.timeout(self.idle_s) as timer:

            def restart_timer() -> None:
                timer.reschedule(min(loop.time() + self.idle_s, end))

            async def body() -> AsyncIterator[bytes]:
                async for chunk in request.stream():  # h11 enforces the content length
                    restart_timer()
                    yield chunk
                    restart_timer()

            content: bytes | AsyncIterator[bytes] = body()
            path = request.scope["raw_path"]
            if path == PUSH_MESSAGES:
                content = b"".join([chunk async for chunk in body()])
                if (fault := push_fault(content)) is not None:
                    raise RefusedError(403, "not-a-reply", f"a pushed message is refused: {fault}")
            # Not `client.build_request`, which would add its own headers.
            headers = request_headers(request, self.token, length)
            call = httpx.Request("POST", f"https://{self.address}{path.decode()}", headers=headers, content=content)
            response = await self.superlink.send(call, stream=True)
            try:
                started = answer_headers(response.headers.raw)
                await send({"type": "http.response.start", "status": response.status_code, "headers": started})
                async for chunk in response.aiter_raw(CHUNK_BYTES):
                    restart_timer()
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                    restart_timer()
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            finally:
                await response.aclose()


def _answer(status: int, content: dict[str, str] | None) -> Response:
    """Create a response of the gateway, after which the connection is closed without reading the request's body."""
    body = b"" if content is None else json.dumps(content).encode()
    return Response(body, status, {"connection": "close"}, media_type="application/json" if body else None)


def superlink_client(ca: Path) -> httpx.AsyncClient:
    """Create a TLS 1.3 client for the SuperLink that trusts only `ca` (PEM) and ignores proxy settings."""
    context = ssl.create_default_context(cafile=ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return httpx.AsyncClient(
        verify=context,
        trust_env=False,
        limits=httpx.Limits(max_connections=MAX_REGISTERED, keepalive_expiry=SUPERLINK_KEEP_ALIVE_S),
        timeout=httpx.Timeout(None, connect=5.0, pool=5.0),  # the gateway's own timer covers the rest
    )
