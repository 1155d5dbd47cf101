"""The gateway's application: it decides about each call, and forwards those that pass to the SuperLink."""

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
"""The header that carries the token to the SuperLink."""

FORWARDED = frozenset((b"accept", b"accept-encoding", b"content-type", b"user-agent"))
"""Headers of a request that the SuperLink gets to see, beside those that begin with `flwr-`."""

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
"""Headers of an answer that concern one connection and are not passed on."""

IDLE_S = 30.0
"""Longest time without a byte moving, in seconds: what Flower's client allows a call."""

CALL_S = 600.0
"""Longest time for one call, in seconds."""

SUPERLINK_KEEP_ALIVE_S = 4.0
"""Shorter than the 5 s after which the SuperLink closes an idle connection, or calls would meet closed ones."""

HEALTH_S = 1.0
"""Longest wait for the SuperLink's TCP connection, and how long its result is used again, in seconds."""

PIECE = 2**18
"""Bytes of an answer that are passed on at once: half as fast again as the 16 KiB in which TLS hands them over."""


def answer_headers(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The SuperLink's headers less those of its connection to the gateway."""
    pairs = [(name.lower(), value) for name, value in headers]
    named = {word.strip().lower() for name, value in pairs if name == b"connection" for word in value.split(b",")}
    return [(name, value) for name, value in pairs if name not in HOP_BY_HOP and name not in named]


def request_headers(request: Request, token: str, length: int) -> list[tuple[bytes, bytes]]:
    """What the SuperLink gets to see: Flower's headers, the body's length, the caller's address, the token if any."""
    headers = [(name, value) for name, value in request.headers.raw if name in FORWARDED or name.startswith(b"flwr-")]
    headers += [(b"content-length", b"%d" % length), (b"x-forwarded-for", address(request).encode())]
    return [*headers, (TOKEN_HEADER.encode(), token.encode())] if token else headers


def address(request: Request) -> str:
    """IP address of the caller."""
    return request.client.host if request.client else "unknown"


class Health:
    """Whether the SuperLink accepts connections, asked at most once a second."""

    def __init__(self, host: str, port: int) -> None:
        """Ask at this address."""
        self._target = host, port
        self._lock = asyncio.Lock()
        self._asked, self._up = float("-inf"), False

    async def up(self) -> bool:
        """Whether a TCP connection succeeds within a second, now or within the last second."""
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
        except OSError:  # TimeoutError is one
            return False
        writer.close()
        return True


@dataclass
class Gateway:
    """The ASGI application: one call in, the same call out to the SuperLink at `address`, the answer streamed back.

    `address` is HOST:PORT. `limits` bounds the body of each call that is let through, `budget` all that are on their
    way; `idle_s` and `call_s` bound the time of a call, see `IDLE_S` and `CALL_S`.
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
        """Prepare the look at the SuperLink's health."""
        target = urlsplit(f"//{self.address}")
        assert target.hostname is not None
        assert target.port is not None
        self._health = Health(target.hostname, target.port)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward an allowed call; refuse anything else, close its connection and log one line."""
        request = Request(scope, receive)
        started = False
        caller = ""

        async def sending(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        word = ""
        try:
            if self._asks_for_health(request):
                await self._tell_health(request, sending)
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
            status, why = 503, f"the SuperLink cannot be reached: {error!r}"
        except httpx.HTTPError as error:
            status, why = 502, f"the SuperLink broke off: {error!r}"
        except asyncio.CancelledError:
            status, why = 503, "the gateway stops"  # uvicorn would say 500, which is no passing fault
        path = scope["raw_path"][:100].decode("ascii", "backslashreplace")
        who = f"{caller} at {address(request)}" if caller else address(request)
        self.limited_log.warning(caller or "strangers", f"{status} {request.method[:20]} {path} from {who}: {why}")
        if not started:  # else the answer stays incomplete: uvicorn closes the connection and the client retries
            await _answer(status, {"error": word} if word else None)(scope, receive, send)

    def _asks_for_health(self, request: Request) -> bool:
        return request.method == "GET" and request.scope["raw_path"] == HEALTH and not request.scope["query_string"]

    async def _tell_health(self, request: Request, send: Send) -> None:
        up = await self._health.up()
        answer = _answer(200, {"status": "ok"}) if up else _answer(503, {"status": "superlink-down"})
        await answer(request.scope, request.receive, send)

    async def _forward(self, request: Request, length: int, send: Send) -> None:
        """Stream the call to the SuperLink and its answer back; push-messages is read whole and checked first.

        Raises RefusedError, TimeoutError, ClientDisconnect (the caller has gone) and httpx.HTTPError.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + self.call_s
        async with asyncio.timeout(self.idle_s) as clock:

            def moved() -> None:
                clock.reschedule(min(loop.time() + self.idle_s, end))

            async def body() -> AsyncIterator[bytes]:
                async for piece in request.stream():  # h11 keeps it to the stated length
                    moved()
                    yield piece
                    moved()

            content: bytes | AsyncIterator[bytes] = body()
            path = request.scope["raw_path"]
            if path == PUSH_MESSAGES:
                content = b"".join([piece async for piece in body()])
                if (fault := push_fault(content)) is not None:
                    raise RefusedError(403, "not-a-reply", f"a pushed message is refused: {fault}")
            # Not `client.build_request`, which would mix in headers of its own.
            headers = request_headers(request, self.token, length)
            call = httpx.Request("POST", f"https://{self.address}{path.decode()}", headers=headers, content=content)
            answer = await self.superlink.send(call, stream=True)
            try:
                started = answer_headers(answer.headers.raw)
                await send({"type": "http.response.start", "status": answer.status_code, "headers": started})
                async for piece in answer.aiter_raw(PIECE):
                    moved()
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                    moved()
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            finally:
                await answer.aclose()


def _answer(status: int, content: dict[str, str] | None) -> Response:
    """An answer of the gateway's own, after which the connection is closed: the request's body is not read."""
    body = b"" if content is None else json.dumps(content).encode()
    return Response(body, status, {"connection": "close"}, media_type="application/json" if body else None)


def superlink_client(ca: Path) -> httpx.AsyncClient:
    """TLS 1.3 connections to the SuperLink, which trust `ca` (PEM) alone and use no proxy of the environment."""
    context = ssl.create_default_context(cafile=ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return httpx.AsyncClient(
        verify=context,
        trust_env=False,
        limits=httpx.Limits(max_connections=MAX_REGISTERED, keepalive_expiry=SUPERLINK_KEEP_ALIVE_S),
        timeout=httpx.Timeout(None, connect=5.0, pool=5.0),  # the gateway's own clock watches the rest
    )
