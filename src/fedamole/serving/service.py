"""The HTTP API: authorisation, requests into the engines, and their chunks back to the caller.

Prompts, answers and keys are never written to disk or to the log.
"""

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from functools import partial
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from fedamole.serving.calls import Call, CallReader
from fedamole.serving.connections import is_loopback
from fedamole.serving.engine import StoppedError
from fedamole.serving.metrics import CONTENT_TYPE, DISCONNECTED, CallRecord, Metrics
from fedamole.serving.openapi import describe_bodies
from fedamole.serving.protocol import ChatRequest, CompletionRequest, Json, RefusedError, RequestBody
from fedamole.serving.quota import CallerUsage
from fedamole.serving.requests import Chunk, RequestState
from fedamole.serving.responses import model_info, model_list, server_sent_event, usage
from fedamole.serving.scheduling import BusyError
from fedamole.serving.served_models import METRICS_OWNER, ServedModel, ServedModels, ServiceSettings

MAX_BODY_BYTES = 2**20
BODY_TIMEOUT = 30.0
"""Seconds within which a request's body must arrive."""
ChunkQueue = asyncio.Queue[tuple[int, Chunk] | None]
"""Chunks of a request's answers with the answers' indices; None after the caller has disconnected."""


class Service:
    """Routes of OpenAI's API over inference engines. `app` is the ASGI application."""

    def __init__(self, models: Sequence[ServedModel], settings: ServiceSettings) -> None:
        """Create the routes."""
        self.models, self.settings = ServedModels(tuple(models)), settings
        self.metrics = Metrics(settings.log_requests)
        self._calls = CallReader(self.models.engines)
        self._usage_by_caller: dict[str, CallerUsage] = {}
        self._watchers: set[asyncio.Task[None]] = set()
        self.app = FastAPI(title="FedAMoLE", docs_url="/docs" if settings.docs_page else None, redoc_url=None)
        self.app.get("/health")(self.health)
        if settings.metrics:
            self.app.get("/metrics")(self.prometheus)
        self.app.get("/v1/models")(self.list_models)
        self.app.get("/v1/models/{name:path}")(self.one_model)
        self.app.post("/v1/chat/completions")(self.chat)
        self.app.post("/v1/completions")(self.completion)
        describe_bodies(self.app, {"/v1/chat/completions": ChatRequest, "/v1/completions": CompletionRequest})
        self.app.add_exception_handler(RefusedError, _error_response)
        self.app.add_exception_handler(HTTPException, _error_response)
        self.app.add_exception_handler(Exception, _error_response)
        if settings.origins:
            self.app.add_middleware(
                CORSMiddleware,
                allow_origins=settings.origins,
                allow_methods=["GET", "POST"],
                allow_headers=["Authorization", "Content-Type"],
                expose_headers=["Retry-After"],
            )

    @property
    def _stopping(self) -> bool:
        return any(engine.stopped or engine.draining for engine in self.models.engines)

    async def health(self) -> Json:
        """Return status "ok" until the server stops; needs no key."""
        if self._stopping:
            raise _stopping()
        return {"status": "ok"}

    async def prometheus(self, request: Request) -> Response:
        """Return counts of requests and tokens in the text format of Prometheus."""
        if self._owner(request) not in (None, METRICS_OWNER):
            raise RefusedError(403, "this key is for a model; /metrics has a key of its own")
        return Response(self.metrics.text(self.models.models), media_type=CONTENT_TYPE)

    async def list_models(self, request: Request) -> Json:
        """List the models that the caller may use."""
        allowed = self._allowed_models(request)
        return model_list((name, self.models.by_name[name].created) for name in allowed)

    async def one_model(self, request: Request, name: str) -> Json:
        """Describe one model."""
        return model_info(name, self._model(name, self._allowed_models(request)).created)

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        return await self._recorded(request, ChatRequest)

    async def completion(self, request: Request) -> Response:
        """Continue a prompt."""
        return await self._recorded(request, CompletionRequest)

    def _owner(self, request: Request) -> str | None:
        """Owner of the request's key; None if the server has no keys. Raises RefusedError without access."""
        if self.settings.keys is None:
            # A web page in a local browser can reach this server under a host name of its own (DNS rebinding).
            if not is_loopback(_host_of(request)):
                raise RefusedError(403, "a server without keys only answers requests to a loopback address")
            return None
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        owner = self.settings.keys.owner(key.strip()) if scheme.lower() == "bearer" else None
        if owner is None:
            raise RefusedError(401, "no valid key; send `Authorization: Bearer KEY`", "invalid_api_key")
        return owner

    def _allowed_models(self, request: Request) -> Sequence[str]:
        """Names of the models that a caller may use. Raises RefusedError for a wrong key or a foreign host name."""
        owner, names = self._owner(request), tuple(self.models.by_name)
        return names if owner is None else [name for name in names if name == owner]

    def _usage_of(self, request: Request, allowed: Sequence[str]) -> CallerUsage:
        """The usage of the caller: of its key, or of its address if there are no keys."""
        host = "" if request.client is None else request.client.host
        caller = host if self.settings.keys is None else "".join(allowed)
        return self._usage_by_caller.setdefault(caller, CallerUsage(self.settings.per_minute))

    def _model(self, name: str, allowed: Sequence[str]) -> ServedModel:
        """The model with a name. The error is the same for unknown models and those of other callers."""
        if name not in allowed:
            text = "no such model, or you may not use it; see /v1/models"
            raise RefusedError(404, text, "model_not_found", "model")
        return self.models.by_name[name]

    async def _recorded(self, request: Request, kind: type[RequestBody]) -> Response:
        """Answer a request, and count and log it once; a streamed answer is counted at its end."""
        record = CallRecord(request.url.path)
        try:
            response = await self._answer(request, kind, record)
        except RefusedError as error:
            self.metrics.finish(record, error.status)
            raise
        except Exception:
            self.metrics.finish(record, 500)
            raise
        if not isinstance(response, StreamingResponse):
            self.metrics.finish(record, response.status_code)
        return response

    async def _answer(self, request: Request, kind: type[RequestBody], record: CallRecord) -> Response:
        allowed = self._allowed_models(request)
        caller, limits = self._usage_of(request, allowed), self.models.engines[0].limits
        most_open, opened = (limits.max_rows + limits.max_waiting) * max(1, len(allowed)), 1
        caller.open_requests_up_to(most_open)
        try:
            call = await self._read_request(request, kind, allowed, caller, record)
            caller.open_requests_up_to(most_open, len(call.generations) - 1)
            opened = len(call.generations)
            queue = ChunkQueue()
            states = self._submit(call, queue, caller)
        except BaseException:
            caller.close_requests(opened)
            raise
        watcher = asyncio.create_task(_cancel_on_disconnect(request, states, queue))
        self._watchers.add(watcher)
        watcher.add_done_callback(partial(self._close, caller, states))
        chunks = _chunks(queue, watcher, len(states))
        if call.body.stream:
            return StreamingResponse(self._stream(call, chunks), media_type="text/event-stream")
        return await self._complete(call, chunks)

    async def _complete(self, call: Call, chunks: AsyncGenerator[tuple[int, Chunk], None]) -> Response:
        """Wait for all answers and return them."""
        choices: dict[int, Json] = {}
        async with aclosing(chunks):
            async for index, chunk in chunks:
                if chunk.finish == "error":
                    raise self._failed()
                call.record.answer_tokens += chunk.tokens
                text, logprobs = call.text_before(index) + chunk.text, call.logprobs_json(index, chunk)
                choices[index] = call.response.choice(index, text, str(chunk.finish), logprobs)
        if len(choices) < len(call.generations):
            return Response(status_code=DISCONNECTED)
        counts = usage(call.record.prompt_tokens, call.record.answer_tokens)
        return JSONResponse(call.response.complete([choices[index] for index in sorted(choices)], counts))

    async def _stream(self, call: Call, chunks: AsyncGenerator[tuple[int, Chunk], None]) -> AsyncIterator[str]:
        status, response, started = DISCONNECTED, call.response, set[int]()
        try:
            for event in response.first_events(len(call.generations)):
                yield event
            async for index, chunk in chunks:
                if chunk.finish == "error":
                    error = self._failed()
                    status = error.status
                    yield server_sent_event(error.as_json())
                    return
                call.record.answer_tokens += chunk.tokens
                text = chunk.text if index in started else call.text_before(index) + chunk.text
                started.add(index)
                if text or chunk.logprobs:
                    yield response.chunk_event(index, text, call.logprobs_json(index, chunk))
                if chunk.finish:
                    yield response.finish_event(index, chunk.finish)
                    call.record.finished_answers += 1
            if call.record.finished_answers == len(call.generations):
                for event in response.last_events(usage(call.record.prompt_tokens, call.record.answer_tokens)):
                    yield event
                status = 200
        finally:
            self.metrics.finish(call.record, status)

    async def _read_request(
        self,
        request: Request,
        kind: type[RequestBody],
        allowed: Sequence[str],
        caller: CallerUsage,
        record: CallRecord,
    ) -> Call:
        """Receive, parse and tokenise a request. The body is not kept."""
        content = bytearray()
        try:
            await _receive_body(request, content, caller)
            async with caller.tokenising:
                # In a thread: parsing and tokenising a body of the maximum size can take seconds.
                find = partial(self._model, allowed=allowed)
                return await asyncio.to_thread(self._calls.read, kind, bytes(content), find, record)
        finally:
            caller.add_body_bytes(-len(content))

    def _submit(self, call: Call, queue: ChunkQueue, caller: CallerUsage) -> list[RequestState]:
        """Pass a request to its engine. Raises RefusedError if a limit is reached or the engine is stopped."""
        loop = asyncio.get_running_loop()
        tokens = sum(len(generation.prompt) + generation.max_new_tokens for generation in call.generations)
        if caller.bucket is not None:
            caller.bucket.take(tokens)

        def receive(index: int, chunk: Chunk) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, (index, chunk))

        numbered = enumerate(call.generations)
        try:
            return call.model.engine.submit_all([(request, partial(receive, index)) for index, request in numbered])
        except (BusyError, StoppedError) as error:
            if caller.bucket is not None:
                caller.bucket.give_back(tokens)
            if isinstance(error, StoppedError):
                raise _stopping() from error
            raise RefusedError(429, str(error), "rate_limit_exceeded") from error

    def _close(self, caller: CallerUsage, states: Sequence[RequestState], watcher: asyncio.Task[None]) -> None:
        """Release what a request holds, after its answers or when the caller has disconnected."""
        self._watchers.discard(watcher)
        caller.close_requests(len(states))
        for state in states:
            state.cancel()
            if caller.bucket is not None:
                caller.bucket.give_back(state.max_new_tokens - len(state.generated))

    def _failed(self) -> RefusedError:
        return _stopping() if self._stopping else RefusedError(500, "the model failed on this request")


def _stopping() -> RefusedError:
    return RefusedError(503, "the server is stopping; try again later", "stopping")


def _host_of(request: Request) -> str:
    """The host in the request's Host header; empty if there is none."""
    try:
        return urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
    except ValueError:
        return ""


async def _receive_body(request: Request, content: bytearray, caller: CallerUsage) -> None:
    """Append a request's body to `content`. Raises RefusedError if it is not JSON, too large or too late."""
    if not request.headers.get("content-type", "").startswith("application/json"):
        raise RefusedError(415, "send the body with Content-Type: application/json")
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            async for part in request.stream():
                if len(content) + len(part) > MAX_BODY_BYTES:
                    raise RefusedError(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
                caller.add_body_bytes(len(part))
                content += part
    except TimeoutError:
        raise RefusedError(408, f"the body took longer than {BODY_TIMEOUT:.0f} seconds") from None
    except ClientDisconnect:
        raise RefusedError(400, "the connection was closed before the end of the body") from None


async def _cancel_on_disconnect(request: Request, states: Sequence[RequestState], queue: ChunkQueue) -> None:
    """Wait until the caller disconnects, then cancel its request."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    for state in states:
        state.cancel()
    queue.put_nowait(None)


async def _chunks(
    queue: ChunkQueue, watcher: asyncio.Task[None], answers: int
) -> AsyncGenerator[tuple[int, Chunk], None]:
    """Yield the chunks of all answers until the last ones, or until the caller disconnects."""
    try:
        while answers and (entry := await queue.get()) is not None:
            answers -= entry[1].finish is not None
            yield entry
    finally:
        watcher.cancel()


async def _error_response(_: Request, error: Exception) -> Response:
    """Convert any exception to an error response in OpenAI's format."""
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
