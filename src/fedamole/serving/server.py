"""The HTTP side: who may ask which model, requests into the engine, its pieces out again.

Nothing here writes a prompt, an answer or a key anywhere.
"""

import asyncio
import ipaddress
import secrets
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from fedamole.data.examples import Example
from fedamole.errors import ConfigError, DataError
from fedamole.personal.generate import Layout, as_it_is, ids_of, rendered
from fedamole.serving.engine import BusyError, Engine, Piece, StoppedError, Wanted
from fedamole.serving.engine import Request as Asked
from fedamole.serving.keys import Keys
from fedamole.serving.protocol import (
    Body,
    Chat,
    Completion,
    Json,
    RefusedError,
    Shape,
    event,
    model,
    models,
    read,
    usage,
)

LARGEST = 2**20
"""Bytes of a request's body."""
PATIENCE = 30.0
"""Seconds in which a request's body has to be here."""
GLANCE = 0.5
"""Seconds after which a request that is told nothing looks whether its client is still there."""


@dataclass(frozen=True)
class Offer:
    """What is served."""

    names: tuple[str, ...]
    """Names of the models, in the order of the engine's clients."""
    created: int
    """When they were saved, in seconds since 1970."""
    longest: int
    """Most tokens of an answer where the request does not say."""
    layouts: tuple[Layout, ...]
    """How rows become prompts, for each model."""
    keys: Keys | None
    """Whose key opens what; None: everybody who reaches this machine's own address may ask for everything."""


class Service:
    """OpenAI's routes over one engine."""

    def __init__(self, engine: Engine, offer: Offer) -> None:
        """Lay the routes; `app` is what a server runs."""
        self.engine, self.offer = engine, offer
        self.tokenizer = engine.bank.base.tokenizer
        self.app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        self.app.get("/health")(self.health)
        self.app.get("/v1/models")(self.list_models)
        self.app.get("/v1/models/{name}")(self.one_model)
        self.app.post("/v1/chat/completions")(self.chat)
        self.app.post("/v1/completions")(self.completion)
        self.app.add_exception_handler(RefusedError, _refusal)
        self.app.add_exception_handler(HTTPException, _refusal)
        self.app.add_exception_handler(Exception, _refusal)

    async def health(self) -> Json:
        """Say that the server is there, and nothing else."""
        if self.engine.stopped:
            raise _stopping()
        return {"status": "ok"}

    async def list_models(self, request: Request) -> Json:
        """The models that whoever asks may use."""
        return models(self._open_to(request), self.offer.created)

    async def one_model(self, request: Request, name: str) -> Json:
        """One of them."""
        self._place(name, self._open_to(request))
        return model(name, self.offer.created)

    async def chat(self, request: Request) -> Response:
        """Go on with a conversation."""
        return await self._answer(request, Chat)

    async def completion(self, request: Request) -> Response:
        """Go on with a text."""
        return await self._answer(request, Completion)

    def _open_to(self, request: Request) -> Sequence[str]:
        """Names of the models that a request may use; RefusedError for a wrong key or a page from elsewhere."""
        if self.offer.keys is None:
            # A page in a browser on this machine may come here under a name of its own choice (DNS rebinding).
            if not is_loopback(urlsplit(f"//{request.headers.get('host', '')}").hostname or ""):
                raise RefusedError(403, "without keys only requests to this machine's own address are answered")
            return self.offer.names
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        owner = self.offer.keys.owner(key.strip()) if scheme.lower() == "bearer" else None
        if owner is None:
            raise RefusedError(401, "no valid key; send `Authorization: Bearer KEY`", "invalid_api_key")
        return [name for name in self.offer.names if name == owner]

    def _place(self, name: str, allowed: Sequence[str]) -> int:
        """The engine's number for a model; for one that is not there and for one of somebody else the same error."""
        if name not in allowed:
            text = "there is no such model, or it is not yours; see /v1/models"
            raise RefusedError(404, text, "model_not_found", "model")
        return self.offer.names.index(name)

    async def _answer(self, request: Request, kind: type[Body]) -> Response:
        allowed = self._open_to(request)
        body = read(kind, await _content(request))
        client = self._place(body.model, allowed)
        ids = await asyncio.to_thread(ids_of, self._prompt(body, client), self.tokenizer)
        if not ids:
            raise RefusedError(400, "the prompt is empty", "invalid_value", "prompt")
        if not self.engine.room(ids):
            most = self.engine.bank.base.max_positions - len(self.engine.bank.prefix(()))
            raise RefusedError(
                400, f"the prompt has {len(ids)} tokens, this model reads {most} at most", "context_length_exceeded",
            )
        told: asyncio.Queue[Piece] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        wanted = Wanted(
            client, ids, body.longest or self.offer.longest, body.temperature or 0.0,
            1.0 if body.top_p is None else body.top_p, body.seed, body.stops, bool(body.stream),
        )
        try:
            asked = self.engine.submit(wanted, lambda piece: loop.call_soon_threadsafe(told.put_nowait, piece))
        except BusyError as error:
            raise RefusedError(429, str(error), "rate_limit_exceeded") from error
        except StoppedError as error:
            raise _stopping() from error
        shape, pieces = Shape(body, secrets.token_hex(12)), self._pieces(request, asked, told)
        if body.stream:
            return StreamingResponse(self._stream(shape, pieces, len(ids)), media_type="text/event-stream")
        async for piece in pieces:
            if piece.finish == "error":
                raise self._failed()
            return JSONResponse(shape.whole(piece.text, str(piece.finish), usage(len(ids), piece.tokens)))
        return Response(status_code=499)  # nobody is there to read it

    def _prompt(self, body: Body, client: int) -> Example:
        """The prompt that a request holds, or that its row makes in the client's template."""
        text = body.text()
        if not isinstance(body, Completion) or not body.row:
            return as_it_is(text)
        try:
            return rendered([body.row], self.offer.layouts[client], "row")[0]
        except DataError as error:
            raise RefusedError(400, str(error), "invalid_value", "row") from error

    async def _stream(self, shape: Shape, pieces: AsyncIterator[Piece], prompt: int) -> AsyncIterator[str]:
        for text in shape.first():
            yield text
        async for piece in pieces:
            if piece.finish == "error":
                yield event(self._failed().as_json())
                return
            if piece.text:
                yield shape.piece(piece.text)
            if piece.finish:
                for text in shape.last(piece.finish, usage(prompt, piece.tokens)):
                    yield text

    async def _pieces(self, request: Request, asked: Asked, told: asyncio.Queue[Piece]) -> AsyncIterator[Piece]:
        """What the engine tells, up to the end or until the client has gone; the request then leaves the engine."""
        try:
            while not await request.is_disconnected():
                try:
                    piece = await asyncio.wait_for(told.get(), GLANCE)
                except TimeoutError:
                    continue
                yield piece
                if piece.finish:
                    return
        finally:
            asked.leave()

    def _failed(self) -> RefusedError:
        return _stopping() if self.engine.stopped else RefusedError(500, "the model failed on this request")


def _stopping() -> RefusedError:
    return RefusedError(503, "the server is stopping; ask again later", "stopping")


async def _content(request: Request) -> bytes:
    """The body of a request, which is JSON, not too large, and here soon; else a RefusedError."""
    if not request.headers.get("content-type", "").startswith("application/json"):
        raise RefusedError(415, "send the body with Content-Type: application/json")
    content = bytearray()
    try:
        async with asyncio.timeout(PATIENCE):
            async for part in request.stream():
                content += part
                if len(content) > LARGEST:
                    raise RefusedError(413, f"the body is larger than {LARGEST} bytes")
    except TimeoutError:
        raise RefusedError(408, f"the body took longer than {PATIENCE:.0f} seconds") from None
    except ClientDisconnect:
        raise RefusedError(400, "the connection ended before the body") from None
    return bytes(content)


async def _refusal(_: Request, error: Exception) -> Response:
    """Any error in OpenAI's shape."""
    if isinstance(error, HTTPException):
        error = RefusedError(error.status_code, str(error.detail))
    if not isinstance(error, RefusedError):
        error = RefusedError(500, "the server failed on this request")
    headers = {401: {"WWW-Authenticate": "Bearer"}, 413: {"Connection": "close"}, 429: {"Retry-After": "1"}}
    return JSONResponse(error.as_json(), error.status, headers.get(error.status))


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


class Server(uvicorn.Server):
    """A server that stops its engine before it waits for those who are still being answered."""

    def __init__(self, service: Service, certs: Path | None = None) -> None:
        """Serve over TLS with a folder made by `fedamole certs`, else in the clear."""
        tls: dict[str, Any] = {}
        if certs is not None:
            tls = {"ssl_certfile": certs / "server.crt", "ssl_keyfile": certs / "server.key"}
        super().__init__(
            uvicorn.Config(
                service.app, log_config=None, log_level="warning", access_log=False, server_header=False, ws="none",
                lifespan="off", timeout_graceful_shutdown=5, **tls,
            )
        )
        self.engine = service.engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Tell whoever waits, then close."""
        await asyncio.to_thread(self.engine.stop)
        await super().shutdown(sockets)
