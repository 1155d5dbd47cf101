"""OpenAI's API as data types: request bodies, and the JSON of answers, chunks and errors.

Unsupported fields are refused with an error that names them. Fields that do not affect the answer are ignored.
"""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError
from typing_extensions import override

from fedamole.data.json_rows import parse_json_literally
from fedamole.data.layouts import Row, Turn
from fedamole.errors import FedamoleError

IGNORED_FIELDS = frozenset({"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"})
NEUTRAL_VALUES: Mapping[str, tuple[object, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_logprobs": (0,),
}
"""Unsupported fields of OpenAI's API, with the values (besides null) that request nothing and are accepted."""
MIN_TEMPERATURE = 0.001
"""Lowest temperature above 0."""
MAX_STOPS, MAX_STOP_CHARS = 4, 256
"""Maximum number of stop strings, and of characters of each."""
MAX_COLUMNS = 256
"""Maximum number of columns of a row."""
LARGEST_MAX_TOKENS = 1_000_000
"""Largest value of `max_tokens`. The engine's limit on answers is usually much lower."""
SEED_BOUND = 2**63
"""Seeds are integers from -SEED_BOUND to SEED_BOUND - 1."""
RANGES: Mapping[str, str] = {
    "max_completion_tokens": f"a whole number from 1 to {LARGEST_MAX_TOKENS}",
    "max_tokens": f"a whole number from 1 to {LARGEST_MAX_TOKENS}",
    "seed": "a whole number from -2^63 to 2^63 - 1",
    "stop": f"at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters each",
    "temperature": f"0 for the most probable token, or a number from {MIN_TEMPERATURE} to 2",
    "top_p": "a number above 0 and at most 1",
}
"""Valid values of these fields, as error messages state them."""
MAX_ERROR_CHARS = 300
"""Maximum length of an error message, which may quote field names of a request."""
ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}

Json = dict[str, Any]
B = TypeVar("B", bound="RequestBody")


class RefusedError(FedamoleError):
    """An error response to a request."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None, retry: float = 1.0
    ) -> None:
        """`code` and `param` are those of OpenAI's errors; `retry` is the number of seconds to wait after a 429."""
        super().__init__(message[:MAX_ERROR_CHARS])
        self.status, self.code, self.param, self.retry = status, code, param and param[:64], retry

    def as_json(self) -> Json:
        """Return the error in OpenAI's format."""
        kind = ERROR_TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool | None = None


def _check_temperature(value: float) -> float:
    if 0 < value < MIN_TEMPERATURE:
        raise ValueError("too low")
    return value


def _check_columns(value: object) -> object:
    """Refuse a row with too many columns before each column is validated, which would take long."""
    if isinstance(value, dict) and len(value) > MAX_COLUMNS:
        raise ValueError(f"at most {MAX_COLUMNS} columns")
    return value


TokenCount = Annotated[int, Field(ge=1, le=LARGEST_MAX_TOKENS, strict=True)]
Temperature = Annotated[float, Field(ge=0, le=2, strict=True, allow_inf_nan=False), AfterValidator(_check_temperature)]
StringList = Annotated[list[str], Field(fail_fast=True)]
"""Validation stops at the first invalid element: collecting half a million errors would take seconds."""


class RequestBody(BaseModel):
    """Fields that both kinds of request have."""

    model_config = ConfigDict(extra="allow")
    model: str
    max_tokens: TokenCount | None = None
    temperature: Temperature | None = None
    top_p: Annotated[float, Field(gt=0, le=1, strict=True, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-SEED_BOUND, lt=SEED_BOUND, strict=True)] | None = None
    stop: str | StringList | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, none or several."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def max_answer_tokens(self) -> int | None:
        """Maximum length of the answer; None if the request sets none."""
        return self.max_tokens


class CompletionRequest(RequestBody):
    """A prompt to continue verbatim, or `row`: columns for the client's template, an extension of OpenAI's API."""

    prompt: str | StringList = ""
    row: Annotated[dict[str, str | int | float | bool | None], BeforeValidator(_check_columns)] | None = None
    _columns: Row = PrivateAttr(default_factory=dict)

    @property
    def columns(self) -> Row:
        """The row with each number as the request writes it, as in training: `1.10` stays `1.10`."""
        return self._columns

    def read_columns(self, content: bytes) -> None:
        """Read the columns from the body of this request. Raises RefusedError if a key occurs twice."""
        try:
            self._columns = parse_json_literally(content.decode("utf-8"))["row"]
        except ValueError as error:
            raise RefusedError(400, f"row: {error}", "invalid_value", "row") from None

    def prompt_text(self) -> str:
        """Return the prompt as text."""
        if self.row and self.prompt:
            raise RefusedError(400, "row: send either row or prompt, not both", "invalid_value", "row")
        if isinstance(self.prompt, str):
            return self.prompt
        if len(self.prompt) != 1:
            raise RefusedError(400, "prompt: send one request per prompt", "unsupported_value", "prompt")
        return self.prompt[0]


class TextPart(BaseModel):
    """A part of a message's content. Only text is supported."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of a conversation."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]


class ChatRequest(RequestBody):
    """A conversation for which the model generates the next answer."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: TokenCount | None = None

    @property
    @override
    def max_answer_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def turns(self) -> list[Turn]:
        """Return the conversation as (role, text)."""
        turns: list[Turn] = []
        for message in self.messages:
            content = message.content
            text = content if isinstance(content, str) else "".join(part.text for part in content)
            turns.append(("system" if message.role == "developer" else message.role, text))
        return turns


def parse_body(kind: type[B], content: bytes) -> B:
    """Parse and validate a request body. Raises RefusedError, which may quote field names but no values."""
    try:
        body = kind.model_validate_json(content)
    except ValidationError as error:
        raise _validation_error(error) from None
    for name, value in (body.model_extra or {}).items():
        if value is None or name in IGNORED_FIELDS:
            continue
        if any(_same_json(value, neutral) for neutral in NEUTRAL_VALUES.get(name, ())):
            continue
        if name in NEUTRAL_VALUES:
            only = " or ".join(json.dumps(value) for value in NEUTRAL_VALUES[name])
            raise RefusedError(400, f"{name}: must be {only}, or left out", "unsupported_value", name)
        raise RefusedError(400, f"{name[:64]}: unknown field; leave it out", "unknown_parameter", name[:64])
    if isinstance(body, CompletionRequest) and body.row:
        body.read_columns(content)
    stops = body.stop_strings
    if len(stops) > MAX_STOPS or not all(0 < len(text) <= MAX_STOP_CHARS for text in stops):
        raise RefusedError(400, f"stop: must be {RANGES['stop']}", "invalid_value", "stop")
    return body


def _validation_error(error: ValidationError) -> RefusedError:
    """The first validation error, as a response."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = ".".join(map(str, first["loc"]))
    field = path.partition(".")[0]
    if field in RANGES:
        return RefusedError(400, f"{field}: must be {RANGES[field]}", "invalid_value", field)
    reason = first["msg"].removeprefix("Value error, ")
    message = f"{path[:64]}: {reason}" if path else "the body is not a JSON object"
    return RefusedError(400, message, "invalid_value", path or None)


def _same_json(value: object, other: object) -> bool:
    """Whether two values are equal as JSON, in which 0 is not false."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def model_list(names: Sequence[str], created: int) -> Json:
    """Return the response that lists models."""
    return {"object": "list", "data": [model_info(name, created) for name in names]}


def model_info(name: str, created: int) -> Json:
    """Return the response that describes one model."""
    return {"id": name, "object": "model", "created": created, "owned_by": "fedamole"}


def usage(prompt: int, answer: int) -> dict[str, int]:
    """Return token counts; virtual tokens and the end-of-text token are not counted."""
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


class ResponseFormat:
    """The JSON of one answer, whole or in chunks. All chunks of an answer have the same id and creation time."""

    def __init__(self, body: RequestBody, unique_id: str) -> None:
        """Format the answer to a request; `unique_id` must differ between answers."""
        self.chat = isinstance(body, ChatRequest)
        self.head = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{unique_id}",
            "created": int(time.time()),
            "model": body.model,
        }
        options = body.stream_options
        self.with_usage = bool(options and options.include_usage)

    def whole(self, text: str, finish: str, counts: dict[str, int]) -> Json:
        """Return the response with the whole answer."""
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": [self._choice(content, finish)], "usage": counts}

    def first_events(self) -> list[str]:
        """Return the events before the first chunk."""
        return [self._event([self._choice({"delta": {"role": "assistant", "content": ""}}, None)])] if self.chat else []

    def chunk_event(self, text: str) -> str:
        """Return the event of one chunk."""
        return self._event([self._choice({"delta": {"content": text}} if self.chat else {"text": text}, None)])

    def last_events(self, finish: str, counts: dict[str, int]) -> list[str]:
        """Return the events after the last chunk."""
        events = [self._event([self._choice({"delta": {}} if self.chat else {"text": ""}, finish)])]
        if self.with_usage:
            events.append(self._event([], counts))
        return [*events, "data: [DONE]\n\n"]

    def _choice(self, content: Json, finish: str | None) -> Json:
        return {"index": 0, **content, "logprobs": None, "finish_reason": finish}

    def _event(self, choices: list[Json], counts: dict[str, int] | None = None) -> str:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        usage_field = {"usage": counts} if self.with_usage else {}
        return server_sent_event({**self.head, "object": kind, "choices": choices, **usage_field})


def server_sent_event(content: Json) -> str:
    """Format one server-sent event."""
    return f"data: {json.dumps(content)}\n\n"
