"""OpenAI's interface as data: what a request may hold, and the shapes of answers, pieces and errors.

What this server does not do is refused by name; fields that change nothing here are read over.
"""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError

from fedamole.data.json_rows import parse_json_literally
from fedamole.data.layouts import Row, conversation_prompt
from fedamole.errors import FedamoleError

IGNORED = frozenset({"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"})
NEUTRAL: Mapping[str, tuple[object, ...]] = {
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
"""Fields of OpenAI's that are taken with these values (or null) alone, because they then ask for nothing."""
COOLEST = 0.001
"""The lowest temperature above 0."""
STOPS, STOP_LETTERS = 4, 256
"""Most stop strings, and most characters of each."""
COLUMNS = 256
"""Most columns of a row."""
LONGEST = 1_000_000
"""The largest `max_tokens`; the engine's own limit on answers is usually far lower."""
SEEDS = 2**63
"""Seeds are whole numbers from -SEEDS to SEEDS - 1."""
RANGES: Mapping[str, str] = {
    "max_completion_tokens": f"a whole number from 1 to {LONGEST}",
    "max_tokens": f"a whole number from 1 to {LONGEST}",
    "seed": "a whole number from -2^63 to 2^63 - 1",
    "stop": f"at most {STOPS} texts of 1 to {STOP_LETTERS} characters each",
    "temperature": f"0 for the most probable token, or a number from {COOLEST} to 2",
    "top_p": "a number above 0 and at most 1",
}
"""What these fields may be, as errors say it."""
SHOWN = 300
"""Most characters of an error's text: it may repeat names that a request gave."""
KINDS = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}

Json = dict[str, Any]
B = TypeVar("B", bound="Body")


class RefusedError(FedamoleError):
    """A request that gets an error instead of an answer."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None, retry: float = 1.0
    ) -> None:
        """Keep the HTTP status, and `code` and `param` as OpenAI uses them.

        `retry` is the number of seconds after which a request that came too early (429) may be sent again.
        """
        super().__init__(message[:SHOWN])
        self.status, self.code, self.param, self.retry = status, code, param and param[:64], retry

    def as_json(self) -> Json:
        """The error in OpenAI's shape."""
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    """How an answer in pieces ends."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool | None = None


def _warm(value: float) -> float:
    if 0 < value < COOLEST:
        raise ValueError("too low")
    return value


def _few(value: object) -> object:
    """Refuse a row with too many columns before each of them is looked at, which would take long."""
    if isinstance(value, dict) and len(value) > COLUMNS:
        raise ValueError(f"at most {COLUMNS} columns")
    return value


Amount = Annotated[int, Field(ge=1, le=LONGEST, strict=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
"""A list that is refused at its first wrong element: an error for each of half a million would take seconds."""


class Body(BaseModel):
    """What both kinds of request have in common."""

    model_config = ConfigDict(extra="allow")
    model: str
    max_tokens: Amount | None = None
    temperature: Annotated[float, Field(ge=0, le=2, strict=True, allow_inf_nan=False), AfterValidator(_warm)] | None = (
        None
    )
    top_p: Annotated[float, Field(gt=0, le=1, strict=True, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-SEEDS, lt=SEEDS, strict=True)] | None = None
    stop: str | Texts | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def longest(self) -> int | None:
        """Most tokens of the answer, where it is said."""
        return self.max_tokens

    def text(self) -> str:
        """The prompt as the model reads it."""
        raise NotImplementedError


class Completion(Body):
    """A prompt to go on with, as it stands; or a row of columns, this server's own, for the client's template."""

    prompt: str | Texts = ""
    row: Annotated[dict[str, str | int | float | bool | None], BeforeValidator(_few)] | None = None
    _columns: Row = PrivateAttr(default_factory=dict)

    @property
    def columns(self) -> Row:
        """The row with each number as the request writes it, as in training: `1.10` stays `1.10`."""
        return self._columns

    def read_columns(self, content: bytes) -> None:
        """Take the columns from the body that this request was read from; RefusedError for a key that comes twice."""
        try:
            self._columns = parse_json_literally(content.decode("utf-8"))["row"]
        except ValueError as error:
            raise RefusedError(400, f"row: {error}", "invalid_value", "row") from None

    def text(self) -> str:
        """The prompt itself."""
        if self.row and self.prompt:
            raise RefusedError(400, "row: give it or a prompt, not both", "invalid_value", "row")
        if isinstance(self.prompt, str):
            return self.prompt
        if len(self.prompt) != 1:
            raise RefusedError(400, "prompt: one text; send a request for each", "unsupported_value", "prompt")
        return self.prompt[0]


class Part(BaseModel):
    """A piece of a message's content; only text is known."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of a conversation; whatever else it has is empty."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(fail_fast=True)]


class Chat(Body):
    """A conversation that the assistant is to go on with."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Amount | None = None

    @property
    def longest(self) -> int | None:
        """Most tokens of the answer, by its new name or its old one."""
        return self.max_completion_tokens or self.max_tokens

    def text(self) -> str:
        """The conversation in the layout of training rows with `messages`."""
        turns = []
        for message in self.messages:
            content = message.content if isinstance(message.content, str) else "".join(p.text for p in message.content)
            turns.append(("system" if message.role == "developer" else message.role, content))
        return conversation_prompt(turns)


def read(kind: type[B], content: bytes) -> B:
    """Read a request's body. What it may not hold is a RefusedError, which repeats names of fields but no text."""
    try:
        body = kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        field = where.partition(".")[0]
        what = f"{where[:64]}: {first['msg'].removeprefix('Value error, ')}" if where else "the body is no JSON object"
        if field in RANGES:
            where, what = field, f"{field}: must be {RANGES[field]}"
        raise RefusedError(400, what, "invalid_value", where or None) from None
    for name, value in (body.model_extra or {}).items():
        if value is None or name in IGNORED or any(_same(value, neutral) for neutral in NEUTRAL.get(name, ())):
            continue
        if name in NEUTRAL:
            only = " or ".join(json.dumps(value) for value in NEUTRAL[name])
            raise RefusedError(400, f"{name}: must be {only}, or left out", "unsupported_value", name)
        raise RefusedError(400, f"{name[:64]}: no such field here; leave it out", "unknown_parameter", name[:64])
    if isinstance(body, Completion) and body.row:
        body.read_columns(content)
    if len(body.stops) > STOPS or not all(0 < len(text) <= STOP_LETTERS for text in body.stops):
        raise RefusedError(400, f"stop: must be {RANGES['stop']}", "invalid_value", "stop")
    return body


def _same(value: object, neutral: object) -> bool:
    """Whether two values are equal as JSON, where 0 is not false."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def models(names: Sequence[str], created: int) -> Json:
    """The list of models."""
    return {"object": "list", "data": [model(name, created) for name in names]}


def model(name: str, created: int) -> Json:
    """One model of the list."""
    return {"id": name, "object": "model", "created": created, "owned_by": "fedamole"}


def usage(prompt: int, answer: int) -> dict[str, int]:
    """Tokens read and written; neither virtual tokens nor the end-of-text token are counted."""
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


class Shape:
    """The answer to one request, whole or in pieces; all of one answer have the same id and time."""

    def __init__(self, body: Body, number: str) -> None:
        """Take what the request asked for, and a `number` that no other answer has."""
        self.chat = isinstance(body, Chat)
        self.head = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{number}",
            "created": int(time.time()),
            "model": body.model,
        }
        options = body.stream_options
        self.with_usage = bool(options and options.include_usage)

    def whole(self, text: str, finish: str, counts: dict[str, int]) -> Json:
        """The answer in one."""
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": [self._choice(said, finish)], "usage": counts}

    def first(self) -> list[str]:
        """What comes before the first piece."""
        return [self._event([self._choice({"delta": {"role": "assistant", "content": ""}}, None)])] if self.chat else []

    def piece(self, text: str) -> str:
        """More of the answer."""
        return self._event([self._choice({"delta": {"content": text}} if self.chat else {"text": text}, None)])

    def last(self, finish: str, counts: dict[str, int]) -> list[str]:
        """What comes after the last piece."""
        ends = [self._event([self._choice({"delta": {}} if self.chat else {"text": ""}, finish)])]
        if self.with_usage:
            ends.append(self._event([], counts))
        return [*ends, "data: [DONE]\n\n"]

    def _choice(self, said: Json, finish: str | None) -> Json:
        return {"index": 0, **said, "logprobs": None, "finish_reason": finish}

    def _event(self, choices: list[Json], counts: dict[str, int] | None = None) -> str:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        more = {"usage": counts} if self.with_usage else {}
        return event({**self.head, "object": kind, "choices": choices, **more})


def event(content: Json) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(content)}\n\n"
