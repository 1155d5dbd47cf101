"""The gateway: the one door that organisations reach, in front of a SuperLink that listens on loopback only.

Flower 1.41 serves its Fleet, Control and Runtime APIs on one port, and whoever reaches the Control API can run code on
the server and on every client. This small reverse proxy ends the organisations' TLS and forwards the Fleet calls of a
SuperNode that has a registered key, nothing else: any other path is 404 with an empty body. It runs as a process of its
own, holds no secret but its TLS key, and streams, so that its memory does not grow with the messages.

    python -m fedamole.deployment.gateway --host 0.0.0.0 --port 9092 --superlink 127.0.0.1:9093 \
        --certificate server.crt --key server.key --ca ca.crt

What goes wrong on the way is answered with a status that SuperNodes retry (502, 503, 504) and never with one that ends
them: on 401 a SuperNode stops itself, on 403 it takes the run for ended, on anything else it gives up.
"""

import argparse
import asyncio
import logging
import signal
import ssl
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

import httpx
import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

LOG = logging.getLogger("fedamole.gateway")

CALLS = frozenset(
    f"/v1/fleet/{call}".encode()
    for call in (
        "activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages", "get-run",
        "get-fab", "push-object", "pull-object", "confirm-message-received",
    )
)  # fmt: skip
"""The calls of a SuperNode with a key, in full. Flower's other two, register-node and unregister-node, are for a
SuperNode without one: should somebody start the SuperLink without `--enable-supernode-auth`, no stranger can join."""

HOP_BY_HOP = frozenset(
    (
        b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
        b"trailer", b"transfer-encoding", b"upgrade",
    )
)  # fmt: skip

NOT_FORWARDED = HOP_BY_HOP | {b"host", b"expect", b"forwarded"}
"""Request headers that end here. So do `x-forwarded-*`: the SuperLink believes them, since they come from loopback."""

CONNECTIONS = 400
"""Most connections of organisations at once, at about two per SuperNode; below the usual limit of 1024 open files."""

IDLE_S = 30.0
"""Longest time without a byte moving, in seconds: what SuperNodes themselves allow a call."""

CALL_S = 600.0
"""Longest time for one call, in seconds: 64 MiB at about 1 Mbit/s."""

KEEP_ALIVE_S = 15
"""Longest wait for a complete head of a request, in seconds; longer than the 5 s after which SuperNodes let go."""

SUPERLINK_KEEP_ALIVE_S = 4.0
"""Shorter than the 5 s after which the SuperLink closes an idle connection, or calls would meet closed ones."""


PIECE = 2**18
"""Bytes of an answer that are passed on at once: half as fast again as the 16 KiB in which TLS hands them over."""


class BodyTooLargeError(Exception):
    """A body that turned out to be larger than allowed while it was passing."""


def kept(headers: Iterable[tuple[bytes, bytes]], dropped: frozenset[bytes]) -> list[tuple[bytes, bytes]]:
    """Headers (names in any case) less the dropped ones and those that the `Connection` header names."""
    pairs = [(name.lower(), value) for name, value in headers]
    named = {word.strip().lower() for name, value in pairs if name == b"connection" for word in value.split(b",")}
    return [(name, value) for name, value in pairs if name not in dropped and name not in named]


def request_headers(request: Request) -> list[tuple[bytes, bytes]]:
    """What the SuperLink gets to see: the caller's headers, and the caller's real address for its access log."""
    headers = [pair for pair in kept(request.headers.raw, NOT_FORWARDED) if not pair[0].startswith(b"x-forwarded-")]
    if "transfer-encoding" in request.headers:
        headers = [pair for pair in headers if pair[0] != b"content-length"]
    return [*headers, (b"x-forwarded-for", address(request).encode())]


def address(request: Request) -> str:
    """IP address of the caller."""
    return request.client.host if request.client else "unknown"


@dataclass(frozen=True)
class Gateway:
    """The ASGI application: one call in, the same call out to `origin` (https://host:port), the answer streamed back.

    `most_bytes` bounds the body of a request; `idle_s` and `call_s` bound its time, see `IDLE_S` and `CALL_S`.
    """

    superlink: httpx.AsyncClient
    origin: str
    most_bytes: int
    idle_s: float = IDLE_S
    call_s: float = CALL_S

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward an allowed call; refuse anything else with an empty body, close its connection and log one line."""
        request = Request(scope, receive)
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            status, why = self._refusal(request) or await self._forward(request, sending)
        except ClientDisconnect:
            return
        except BodyTooLargeError:
            status, why = 413, "the body is too large"
        except TimeoutError:
            status, why = 504, "the call took too long"
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            status, why = 503, f"the SuperLink cannot be reached: {error!r}"
        except httpx.HTTPError as error:
            status, why = 502, f"the SuperLink broke off: {error!r}"
        except asyncio.CancelledError:
            status, why = 503, "the gateway stops"  # uvicorn would say 500, which ends SuperNodes
        if status:
            path = scope["raw_path"][:100].decode("ascii", "backslashreplace")
            LOG.warning("%d %s %s from %s: %s", status, request.method[:20], path, address(request), why)
            if not started:  # else the answer stays incomplete: uvicorn closes the connection and the SuperNode retries
                await Response(status_code=status, headers={"connection": "close"})(scope, receive, send)

    def _refusal(self, request: Request) -> tuple[int, str] | None:
        """Status and reason if the call is not let in. The raw path is compared, so no encoding can dress one up."""
        if request.method != "POST" or request.scope["raw_path"] not in CALLS or request.scope["query_string"]:
            return 404, "not a call of a SuperNode with a registered key"
        if int(request.headers.get("content-length", "0")) > self.most_bytes:
            return 413, "the body is too large"
        return None

    async def _forward(self, request: Request, send: Send) -> tuple[int, str]:
        """Stream the call to the SuperLink and its answer back; (0, "") when all has passed.

        Raises BodyTooLargeError, TimeoutError, ClientDisconnect (the caller has gone) and httpx.HTTPError.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + self.call_s
        async with asyncio.timeout(self.idle_s) as clock:

            def moved() -> None:
                clock.reschedule(min(loop.time() + self.idle_s, end))

            async def body() -> AsyncIterator[bytes]:
                passed = 0
                async for piece in request.stream():
                    passed += len(piece)
                    if passed > self.most_bytes:
                        raise BodyTooLargeError
                    moved()
                    yield piece
                    moved()

            # Not `client.build_request`, which would mix in headers of its own.
            url = self.origin + request.scope["raw_path"].decode()
            call = httpx.Request("POST", url, headers=request_headers(request), content=body())
            answer = await self.superlink.send(call, stream=True)
            try:
                headers = kept(answer.headers.raw, HOP_BY_HOP)
                await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
                async for piece in answer.aiter_raw(PIECE):
                    moved()
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                    moved()
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            finally:
                await answer.aclose()
        return 0, ""


class Protocol(H11Protocol):
    """uvicorn's HTTP/1.1, except that the keep-alive clock runs until the head of a request is complete.

    uvicorn stops it at the first byte and has none before the first request, so a caller that sends slowly, or
    nothing, would hold a connection for ever.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock with the connection."""
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def data_received(self, data: bytes) -> None:
        """Take bytes in; `handle_events` stops the clock when they complete the head of a request."""
        self.conn.receive_data(data)
        self.handle_events()

    def shutdown(self) -> None:
        """Close at once where no call is running: idle SuperNodes do not answer TLS's goodbye for seconds."""
        super().shutdown()
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


def listener(app: Gateway, host: str, port: int, certificate: Path, key: Path) -> uvicorn.Server:
    """A server that is not yet started, with nothing of uvicorn's in the answers and no line for a normal request."""
    return uvicorn.Server(
        uvicorn.Config(
            app, host=host, port=port, ssl_certfile=certificate, ssl_keyfile=key, http=Protocol, ws="none",
            interface="asgi3", lifespan="off", access_log=False, log_config=None, server_header=False,
            date_header=False, proxy_headers=False, limit_concurrency=CONNECTIONS, timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=10,
        )
    )  # fmt: skip


def superlink_client(ca: Path) -> httpx.AsyncClient:
    """A pool of connections to the SuperLink that trusts `ca` (PEM) alone; no proxy of the environment is used."""
    return httpx.AsyncClient(
        verify=ssl.create_default_context(cafile=ca),
        trust_env=False,
        limits=httpx.Limits(max_connections=CONNECTIONS, keepalive_expiry=SUPERLINK_KEEP_ALIVE_S),
        timeout=httpx.Timeout(None, connect=5.0, pool=5.0),  # the gateway's own clock watches the rest
    )


async def serve(
    host: str, port: int, superlink: str, *, certificate: Path, key: Path, ca: Path, most_bytes: int
) -> None:
    """Run until SIGTERM or SIGINT; running calls get 10 s to end. `superlink` is HOST:PORT, the files are PEM."""
    async with superlink_client(ca) as client:
        LOG.info("from https://%s:%d to the SuperLink at %s, bodies up to %d bytes", host, port, superlink, most_bytes)
        await listener(Gateway(client, f"https://{superlink}", most_bytes), host, port, certificate, key).serve()


def host_and_port(text: str) -> str:
    """`text` if it is HOST:PORT; a ValueError otherwise."""
    parts = urlsplit(f"//{text}")
    if not parts.hostname or not parts.port or parts.netloc != text or parts.username is not None:
        raise ValueError(f"{text!r} is not HOST:PORT")
    return text


def _stop(number: int, _: object) -> NoReturn:
    raise SystemExit(0)  # uvicorn stops in order, then raises the signal again


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and serve. Exits with 2 on a wrong argument, 1 if the port is taken, 0 on SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m fedamole.deployment.gateway", description=__doc__.split("\n")[0])
    parser.add_argument("--host", required=True, help="address that organisations reach")
    parser.add_argument("--port", required=True, type=int)
    parser.add_argument("--superlink", required=True, type=host_and_port, help="HOST:PORT of the SuperLink on loopback")
    parser.add_argument("--certificate", required=True, type=Path, help="PEM, shown to organisations")
    parser.add_argument("--key", required=True, type=Path, help="PEM, its private key")
    parser.add_argument("--ca", required=True, type=Path, help="PEM, verifies the SuperLink's certificate")
    parser.add_argument("--max-body-mib", type=int, default=64, help="largest body of one request (default: 64)")
    args = parser.parse_args(argv)
    for path in (args.certificate, args.key, args.ca):
        if not path.is_file():
            parser.error(f"{path}: no such file")
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it has a line for every request
    files = {"certificate": args.certificate, "key": args.key, "ca": args.ca}
    asyncio.run(serve(args.host, args.port, args.superlink, **files, most_bytes=args.max_body_mib * 2**20))


if __name__ == "__main__":
    main()
