"""The HTTP API: authorisation, requests into the engine, and its chunks back to the caller.

Prompts, answers and keys are never written to disk or to the log.
"""

import asyncio
import contextlib
import math
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from fedamole.data.examples import Example
from fedamole.data.text_encoder import text_encoder
from fedamole.data.tokens import prompt_ids
from fedamole.errors import BaseModelError, DataError
from fedamole.model.batch import Ids
from fedamole.personal.generate import PromptFormat, raw_prompt, render_prompts
from fedamole.serving.connections import is_loopback
from fedamole.serving.engine import InferenceEngine, StoppedError
from fedamole.serving.keys import ApiKeys
from fedamole.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    Json,
    RefusedError,
    RequestBody,
    ResponseFormat,
    model_info,
    model_list,
    parse_body,
    server_sent_event,
    usage,
)
from fedamole.serving.quota import CallerUsage
from fedamole.serving.requests import Chunk, GenerationRequest, RequestState
from fedamole.serving.scheduling import BusyError

MAX_BODY_BYTES = 2**20
BODY_TIMEOUT = 30.0
"""Seconds within which a request's body must arrive."""
MAX_CHARS_PER_POSITION = 16
"""Maximum characters of a prompt per position of the base. Longer prompts cannot fit and are not tokenised."""
ChunkQueue = asyncio.Queue[Chunk | None]
"""Chunks of one answer; None after the caller has disconnected."""


@dataclass(frozen=True)
class ServedModels:
    """The models of a server, and its settings."""

    names: tuple[str, ...]
    """Model names, in the order of the engine's clients."""
    created: int
    """Unix time at which they were saved."""
    max_new_tokens: int
    """Maximum length of an answer if the request sets none."""
    formats: tuple[PromptFormat, ...]
    """For each model, how rows become prompts."""
    keys: ApiKeys | None
    """None: no keys are needed; only requests to a loopback address are answered, and for every model."""
    per_minute: int | None = None
    """Maximum tokens of prompts and answers per caller and minute; None: no limit."""


class Service:
    """Routes of OpenAI's API over one inference engine. `app` is the ASGI application."""

    def __init__(self, engine: InferenceEngine, models: ServedModels) -> None:
        """Create the routes."""
        self.engine, self.models = engine, models
        self.tokenizer = engine.bank.base.tokenizer
        text_encoder(self.tokenizer)  # takes 2 seconds for a vocabulary of 256,000: before the first request
        self._usage_by_caller: dict[str, CallerUsage] = {}
        self._watchers: set[asyncio.Task[None]] = set()
        self.app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        self.app.get("/health")(self.health)
        self.app.get("/v1/models")(self.list_models)
        self.app.get("/v1/models/{name}")(self.one_model)
        self.app.post("/v1/chat/completions")(self.chat)
        self.app.post("/v1/completions")(self.completion)
        self.app.add_exception_handler(RefusedError, _error_response)
        self.app.add_exception_handler(HTTPException, _error_response)
        self.app.add_exception_handler(Exception, _error_response)

    async def health(self) -> Json:
        """Return status "ok" until the engine stops; needs no key."""
        if self.engine.stopped:
            raise _stopping()
        return {"status": "ok"}

    async def list_models(self, request: Request) -> Json:
        """List the models that the caller may use."""
        return model_list(self._allowed_models(request), self.models.created)

    async def one_model(self, request: Request, name: str) -> Json:
        """Describe one model."""
        self._model_index(name, self._allowed_models(request))
        return model_info(name, self.models.created)

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        return await self._answer(request, ChatRequest)

    async def completion(self, request: Request) -> Response:
        """Continue a prompt."""
        return await self._answer(request, CompletionRequest)

    def _allowed_models(self, request: Request) -> Sequence[str]:
        """Names of the models that a caller may use. Raises RefusedError for a wrong key or a foreign host name."""
        if self.models.keys is None:
            # A web page in a local browser can reach this server under a host name of its own (DNS rebinding).
            if not is_loopback(_host_of(request)):
                raise RefusedError(403, "a server without keys only answers requests to a loopback address")
            return self.models.names
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        owner = self.models.keys.owner(key.strip()) if scheme.lower() == "bearer" else None
        if owner is None:
            raise RefusedError(401, "no valid key; send `Authorization: Bearer KEY`", "invalid_api_key")
        return [name for name in self.models.names if name == owner]

    def _usage_of(self, request: Request, allowed: Sequence[str]) -> CallerUsage:
        """The usage of the caller: of its key, or of its address if there are no keys."""
        host = "" if request.client is None else request.client.host
        caller = host if self.models.keys is None else "".join(allowed)
        return self._usage_by_caller.setdefault(caller, CallerUsage(self.models.per_minute))

    def _model_index(self, name: str, allowed: Sequence[str]) -> int:
        """The engine's index of a model. The error is the same for unknown models and those of other callers."""
        if name not in allowed:
            text = "no such model, or you may not use it; see /v1/models"
            raise RefusedError(404, text, "model_not_found", "model")
        return self.models.names.index(name)

    async def _answer(self, request: Request, kind: type[RequestBody]) -> Response:
        allowed = self._allowed_models(request)
        caller, limits = self._usage_of(request, allowed), self.engine.limits
        caller.open_request((limits.max_rows + limits.max_waiting) * max(1, len(allowed)))
        try:
            response, generation = await self._read_request(request, kind, allowed, caller)
            queue = ChunkQueue()
            state = self._submit(generation, queue, caller)
        except BaseException:
            caller.close_request()
            raise
        watcher = asyncio.create_task(_cancel_on_disconnect(request, state, queue))
        self._watchers.add(watcher)
        watcher.add_done_callback(partial(self._close, caller, state))
        chunks, prompt_tokens = _chunks(queue, watcher), len(generation.prompt)
        if generation.stream:
            return StreamingResponse(self._stream(response, chunks, prompt_tokens), media_type="text/event-stream")
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                if chunk.finish == "error":
                    raise self._failed()
                return JSONResponse(response.whole(chunk.text, str(chunk.finish), usage(prompt_tokens, chunk.tokens)))
        return Response(status_code=499)  # the caller has disconnected

    async def _read_request(
        self, request: Request, kind: type[RequestBody], allowed: Sequence[str], caller: CallerUsage
    ) -> tuple[ResponseFormat, GenerationRequest]:
        """Receive, parse and tokenise a request. The body is not kept."""
        content = bytearray()
        try:
            await _receive_body(request, content, caller)
            async with caller.tokenising:
                # In a thread: parsing and tokenising a body of the maximum size can take seconds.
                body, client, ids = await asyncio.to_thread(self._parse, kind, bytes(content), allowed)
        finally:
            caller.add_body_bytes(-len(content))
        generation = GenerationRequest(
            client,
            ids,
            self.engine.max_new_tokens(ids, body.max_answer_tokens or self.models.max_new_tokens),
            body.temperature or 0.0,
            1.0 if body.top_p is None else body.top_p,
            body.seed,
            body.stop_strings,
            bool(body.stream),
        )
        return ResponseFormat(body, secrets.token_hex(12)), generation

    def _parse(self, kind: type[RequestBody], content: bytes, allowed: Sequence[str]) -> tuple[RequestBody, int, Ids]:
        """The body of a request, the engine's index of its model, and the token ids of its prompt."""
        body = parse_body(kind, content)
        client = self._model_index(body.model, allowed)
        return body, client, self._tokenise(body, client)

    def _submit(self, generation: GenerationRequest, queue: ChunkQueue, caller: CallerUsage) -> RequestState:
        """Pass a request to the engine. Raises RefusedError if a limit is reached or the engine is stopped."""
        loop, tokens = asyncio.get_running_loop(), len(generation.prompt) + generation.max_new_tokens
        if caller.bucket is not None:
            caller.bucket.take(tokens)
        try:
            return self.engine.submit(generation, lambda chunk: loop.call_soon_threadsafe(queue.put_nowait, chunk))
        except (BusyError, StoppedError) as error:
            if caller.bucket is not None:
                caller.bucket.give_back(tokens)
            if isinstance(error, StoppedError):
                raise _stopping() from error
            raise RefusedError(429, str(error), "rate_limit_exceeded") from error

    def _close(self, caller: CallerUsage, state: RequestState, watcher: asyncio.Task[None]) -> None:
        """Release what a request holds, after its answer or when the caller has disconnected."""
        state.cancel()
        self._watchers.discard(watcher)
        caller.close_request()
        if caller.bucket is not None:
            caller.bucket.give_back(state.max_new_tokens - len(state.generated))

    def _tokenise(self, body: RequestBody, client: int) -> Ids:
        """Token ids of a prompt. Raises RefusedError if it is empty or too long."""
        example, positions = self._example(body, client), self.engine.bank.base.max_positions
        characters = len(example.conversation)
        if characters > MAX_CHARS_PER_POSITION * positions:
            text = f"the prompt has {characters} characters; at most {MAX_CHARS_PER_POSITION * positions} fit"
            raise RefusedError(400, text, "context_length_exceeded")
        try:
            ids = prompt_ids(example, self.tokenizer)
        except BaseModelError as error:  # it names a folder of this machine
            text = "the base's chat template refuses this conversation; alternate the roles, or send no system message"
            raise RefusedError(400, text, "invalid_value", "messages") from error
        if not ids:
            raise RefusedError(400, "the prompt is empty", "invalid_value", "prompt")
        if not self.engine.max_new_tokens(ids, 1):
            limit = positions - len(self.engine.bank.prefix(()))
            text = f"the prompt has {len(ids)} tokens; this model reads at most {limit}"
            raise RefusedError(400, text, "context_length_exceeded")
        return ids

    def _example(self, body: RequestBody, client: int) -> Example:
        """The prompt of a request: a conversation, a row in the client's template, or a text."""
        prompt_format = self.models.formats[client]
        try:
            if isinstance(body, ChatRequest):
                return prompt_format.conversation(body.turns())
            assert isinstance(body, CompletionRequest)
            text = body.prompt_text()
            return render_prompts([body.columns], prompt_format, "row")[0] if body.row else raw_prompt(text)
        except DataError as error:
            field = "messages" if isinstance(body, ChatRequest) else "row"
            raise RefusedError(400, str(error), "invalid_value", field) from error

    async def _stream(
        self, response: ResponseFormat, chunks: AsyncGenerator[Chunk, None], prompt_tokens: int
    ) -> AsyncIterator[str]:
        for event in response.first_events():
            yield event
        async for chunk in chunks:
            if chunk.finish == "error":
                yield server_sent_event(self._failed().as_json())
                return
            if chunk.text:
                yield response.chunk_event(chunk.text)
            if chunk.finish:
                for event in response.last_events(chunk.finish, usage(prompt_tokens, chunk.tokens)):
                    yield event

    def _failed(self) -> RefusedError:
        return _stopping() if self.engine.stopped else RefusedError(500, "the model failed on this request")


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


async def _cancel_on_disconnect(request: Request, state: RequestState, queue: ChunkQueue) -> None:
    """Wait until the caller disconnects, then cancel its request."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    state.cancel()
    queue.put_nowait(None)


async def _chunks(queue: ChunkQueue, watcher: asyncio.Task[None]) -> AsyncGenerator[Chunk, None]:
    """Yield an answer's chunks until the last one, or until the caller disconnects."""
    try:
        while (chunk := await queue.get()) is not None:
            yield chunk
            if chunk.finish:
                return
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
