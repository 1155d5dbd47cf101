"""The HTTP side: who may ask which model, requests into the engine, its pieces out again.

Nothing here writes a prompt, an answer or a key anywhere.
"""

import asyncio
import contextlib
import logging
import math
import secrets
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from fedamole.data.examples import Example
from fedamole.data.text_encoder import text_encoder
from fedamole.data.tokens import prompt_ids
from fedamole.errors import DataError
from fedamole.model.batch import Ids
from fedamole.personal.generate import Layout, as_it_is, rendered
from fedamole.serving.connections import Door, is_loopback
from fedamole.serving.engine import Engine, Piece, StoppedError, Wanted, said
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
from fedamole.serving.quota import Caller
from fedamole.serving.scheduling import BusyError
from fedamole.terminal import printable

log = logging.getLogger(__name__)

LARGEST = 2**20
"""Bytes of a request's body."""
PATIENCE = 30.0
"""Seconds in which a request's body has to be here."""
KEPT_OPEN = 5
"""Seconds for which a connection stays open between two requests."""
LETTERS = 16
"""Most characters of a prompt, for each position of the base: more cannot fit, and is not turned into tokens."""
Told = asyncio.Queue[Piece | None]
"""Pieces of an answer; None when the client has gone."""


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
    per_minute: int | None = None
    """Most tokens of prompts and answers that a caller may use in a minute."""


class Service:
    """OpenAI's routes over one engine."""

    def __init__(self, engine: Engine, offer: Offer) -> None:
        """Lay the routes; `app` is what a server runs."""
        self.engine, self.offer = engine, offer
        self.tokenizer = engine.bank.base.tokenizer
        text_encoder(self.tokenizer)  # takes 2 seconds for a vocabulary of 256,000: not within the first request
        self._callers: dict[str, Caller] = {}
        self._watches: set[asyncio.Task[None]] = set()
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
            if not is_loopback(_host_of(request)):
                raise RefusedError(403, "without keys only requests to this machine's own address are answered")
            return self.offer.names
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        owner = self.offer.keys.owner(key.strip()) if scheme.lower() == "bearer" else None
        if owner is None:
            raise RefusedError(401, "no valid key; send `Authorization: Bearer KEY`", "invalid_api_key")
        return [name for name in self.offer.names if name == owner]

    def _caller(self, request: Request, allowed: Sequence[str]) -> Caller:
        """What the key of a request, or without keys its address, uses now."""
        host = "" if request.client is None else request.client.host
        name = host if self.offer.keys is None else "".join(allowed)
        return self._callers.setdefault(name, Caller(self.offer.per_minute))

    def _place(self, name: str, allowed: Sequence[str]) -> int:
        """The engine's number for a model; for one that is not there and for one of somebody else the same error."""
        if name not in allowed:
            text = "there is no such model, or it is not yours; see /v1/models"
            raise RefusedError(404, text, "model_not_found", "model")
        return self.offer.names.index(name)

    async def _answer(self, request: Request, kind: type[Body]) -> Response:
        allowed = self._open_to(request)
        caller, limits = self._caller(request, allowed), self.engine.limits
        caller.enter((limits.rows + limits.waiting) * max(1, len(allowed)))
        try:
            shape, wanted = await self._wanted(request, kind, allowed, caller)
            told = Told()
            asked = self._submit(wanted, told, caller)
        except BaseException:
            caller.leave()
            raise
        watch = asyncio.create_task(_until_gone(request, asked, told))
        self._watches.add(watch)
        watch.add_done_callback(partial(self._close, caller, asked))
        pieces, prompt = _pieces(told, watch), len(wanted.prompt)
        if wanted.pieces:
            return StreamingResponse(self._stream(shape, pieces, prompt), media_type="text/event-stream")
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                if piece.finish == "error":
                    raise self._failed()
                return JSONResponse(shape.whole(piece.text, str(piece.finish), usage(prompt, piece.tokens)))
        return Response(status_code=499)  # nobody is there to read it

    async def _wanted(
        self, request: Request, kind: type[Body], allowed: Sequence[str], caller: Caller
    ) -> tuple[Shape, Wanted]:
        """What a request asks for, and the shape of its answer. Its body is not kept."""
        content = bytearray()
        try:
            await _receive(request, content, caller)
            async with caller.preparing:
                body = read(kind, bytes(content))
                client = self._place(body.model, allowed)
                ids = await asyncio.to_thread(self._ids, body, client)
        finally:
            caller.hold(-len(content))
        limit = min(body.longest or self.offer.longest, self.engine.limits.answer, self.engine.room(ids))
        wanted = Wanted(
            client,
            ids,
            limit,
            body.temperature or 0.0,
            1.0 if body.top_p is None else body.top_p,
            body.seed,
            body.stops,
            bool(body.stream),
        )
        return Shape(body, secrets.token_hex(12)), wanted

    def _submit(self, wanted: Wanted, told: Told, caller: Caller) -> Asked:
        """Have a request wait in the engine; RefusedError where that cannot be."""
        loop, tokens = asyncio.get_running_loop(), len(wanted.prompt) + wanted.limit
        if caller.allowance is not None:
            caller.allowance.take(tokens)
        try:
            return self.engine.submit(wanted, lambda piece: loop.call_soon_threadsafe(told.put_nowait, piece))
        except (BusyError, StoppedError) as error:
            if caller.allowance is not None:
                caller.allowance.give_back(tokens)
            if isinstance(error, StoppedError):
                raise _stopping() from error
            raise RefusedError(429, str(error), "rate_limit_exceeded") from error

    def _close(self, caller: Caller, asked: Asked, watch: asyncio.Task[None]) -> None:
        """An answer is over, or nobody waits for it any more."""
        asked.leave()
        self._watches.discard(watch)
        caller.leave()
        if caller.allowance is not None:
            caller.allowance.give_back(asked.limit - len(asked.made))

    def _ids(self, body: Body, client: int) -> Ids:
        """Token ids of a prompt; RefusedError for one that is empty or too long."""
        prompt, positions = self._prompt(body, client), self.engine.bank.base.max_positions
        if len(prompt.prompt) > LETTERS * positions:
            text = f"the prompt has {len(prompt.prompt)} characters, at most {LETTERS * positions} are read"
            raise RefusedError(400, text, "context_length_exceeded")
        ids = prompt_ids(prompt, self.tokenizer)
        if not ids:
            raise RefusedError(400, "the prompt is empty", "invalid_value", "prompt")
        if not self.engine.room(ids):
            most = positions - len(self.engine.bank.prefix(()))
            text = f"the prompt has {len(ids)} tokens, this model reads {most} at most"
            raise RefusedError(400, text, "context_length_exceeded")
        return ids

    def _prompt(self, body: Body, client: int) -> Example:
        """The prompt that a request holds, or that its row makes in the client's template."""
        text = body.text()
        if not isinstance(body, Completion) or not body.row:
            return as_it_is(text)
        try:
            return rendered([body.columns], self.offer.layouts[client], "row")[0]
        except DataError as error:
            raise RefusedError(400, str(error), "invalid_value", "row") from error

    async def _stream(self, shape: Shape, pieces: AsyncGenerator[Piece, None], prompt: int) -> AsyncIterator[str]:
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

    def _failed(self) -> RefusedError:
        return _stopping() if self.engine.stopped else RefusedError(500, "the model failed on this request")


def _stopping() -> RefusedError:
    return RefusedError(503, "the server is stopping; ask again later", "stopping")


def _host_of(request: Request) -> str:
    """The host that a request names; empty where it names none."""
    try:
        return urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
    except ValueError:
        return ""


async def _receive(request: Request, content: bytearray, caller: Caller) -> None:
    """Take in the body of a request, which is JSON, not too large, and here soon; else a RefusedError."""
    if not request.headers.get("content-type", "").startswith("application/json"):
        raise RefusedError(415, "send the body with Content-Type: application/json")
    try:
        async with asyncio.timeout(PATIENCE):
            async for part in request.stream():
                if len(content) + len(part) > LARGEST:
                    raise RefusedError(413, f"the body is larger than {LARGEST} bytes")
                caller.hold(len(part))
                content += part
    except TimeoutError:
        raise RefusedError(408, f"the body took longer than {PATIENCE:.0f} seconds") from None
    except ClientDisconnect:
        raise RefusedError(400, "the connection ended before the body") from None


async def _until_gone(request: Request, asked: Asked, told: Told) -> None:
    """Wait until the client has gone; its request then leaves the engine at once."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    asked.leave()
    told.put_nowait(None)


async def _pieces(told: Told, watch: asyncio.Task[None]) -> AsyncGenerator[Piece, None]:
    """What the engine tells, up to the end or until the client has gone."""
    try:
        while (piece := await told.get()) is not None:
            yield piece
            if piece.finish:
                return
    finally:
        watch.cancel()


async def _refusal(_: Request, error: Exception) -> Response:
    """Any error in OpenAI's shape."""
    if isinstance(error, HTTPException):
        error = RefusedError(error.status_code, str(error.detail))
    if not isinstance(error, RefusedError):
        error = RefusedError(500, "the server failed on this request")
    headers = {
        401: {"WWW-Authenticate": "Bearer"},
        408: {"Connection": "close"},
        413: {"Connection": "close"},
        429: {"Retry-After": str(math.ceil(error.retry))},
    }
    return JSONResponse(error.as_json(), error.status, headers.get(error.status))


class Alone:
    """An app whose errors end the request that raised them, with one line in the log and no traceback.

    Starlette has answered with status 500 by then, and raises the error once more.
    """

    def __init__(self, app: ASGIApp) -> None:
        """Wrap an app."""
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        try:
            await self.app(scope, receive, send)
        except Exception as error:
            log.error("a request failed: %s", printable(said(error)))


class Server(uvicorn.Server):
    """A server that stops its engine before it waits for those who are still being answered."""

    def __init__(self, service: Service, certs: Path | None = None) -> None:
        """Serve over TLS with a folder made by `fedamole certs`, else in the clear."""
        tls: dict[str, Any] = {}
        if certs is not None:
            tls = {"ssl_certfile": certs / "server.crt", "ssl_keyfile": certs / "server.key"}
        super().__init__(
            uvicorn.Config(
                Alone(service.app),
                http=Door,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="critical",
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEPT_OPEN,
                timeout_graceful_shutdown=5,
                **tls,
            )
        )
        self.engine = service.engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Tell whoever waits, then close."""
        await asyncio.to_thread(self.engine.stop)
        await super().shutdown(sockets)
