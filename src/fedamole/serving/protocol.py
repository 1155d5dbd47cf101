"""Request bodies of OpenAI's API as data types, with their validation, and errors. responses.py has the answers.

Unsupported fields are refused with an error that names them. Fields that do not affect the answer are ignored.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError
from typing_extensions import override

from fedamole.data.json_rows import parse_json_literally
from fedamole.data.layouts import Row, Turn
from fedamole.errors import FedamoleError
from fedamole.model.batch import Ids
from fedamole.serving.json_grammar import ANY_OBJECT

IGNORED_FIELDS = frozenset(
    {
        "functions",
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "safety_identifier",
        "service_tier",
        "store",
        "tools",
        "user",
    }
)
"""Fields that are accepted and have no effect. A model that was not trained to call tools answers in text."""
NEUTRAL_VALUES: Mapping[str, tuple[object, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("auto", "none"),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "suffix": ("",),
    "tool_choice": ("auto", "none"),
    "top_logprobs": (0,),
}
"""Unsupported fields of OpenAI's API, with the values (besides null) that request nothing and are accepted."""
MIN_TEMPERATURE = 0.001
"""Lowest temperature above 0."""
MAX_STOPS, MAX_STOP_CHARS = 16, 256
"""Maximum number of stop strings, and of characters of each."""
MAX_COLUMNS = 256
"""Maximum number of columns of a row."""
MAX_ANSWERS = 64
"""Maximum number of answers to one request: `n` for each of its prompts."""
MAX_LOGPROBS = 20
"""Maximum number of most probable tokens that are reported for each token."""
MIN_PENALTY, MAX_PENALTY = 0.1, 10.0
"""Range of `repetition_penalty`."""
LARGEST_MAX_TOKENS = 1_000_000
"""Largest value of `max_tokens`. The engine's limit on answers is usually much lower."""
SEED_BOUND = 2**63
"""Seeds are integers from -SEED_BOUND to SEED_BOUND - 1."""
RANGES: Mapping[str, str] = {
    "logprobs": f"a whole number from 0 to {MAX_LOGPROBS}; in a chat true or false, with top_logprobs",
    "max_completion_tokens": f"a whole number from 1 to {LARGEST_MAX_TOKENS}",
    "max_tokens": f"a whole number from 1 to {LARGEST_MAX_TOKENS}",
    "min_p": "a number from 0 to 1",
    "n": f"a whole number from 1 to {MAX_ANSWERS}",
    "prompt": "a text, a list of texts, token ids, or a list of lists of token ids",
    "repetition_penalty": f"a number from {MIN_PENALTY} to {MAX_PENALTY:g}; 1 has no effect",
    "seed": "a whole number from -2^63 to 2^63 - 1",
    "stop": f"at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters each",
    "temperature": f"0 for the most probable token, or a number from {MIN_TEMPERATURE} to 2",
    "top_k": "a whole number from 1; 0 and -1 mean all tokens",
    "top_logprobs": f"a whole number from 0 to {MAX_LOGPROBS}, with logprobs = true",
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


def _false_to_none(value: object) -> object:
    return None if value is False else value


TokenCount = Annotated[int, Field(ge=1, le=LARGEST_MAX_TOKENS, strict=True)]
Temperature = Annotated[float, Field(ge=0, le=2, strict=True, allow_inf_nan=False), AfterValidator(_check_temperature)]
Fraction = Annotated[float, Field(ge=0, le=1, strict=True, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=MIN_PENALTY, le=MAX_PENALTY, strict=True, allow_inf_nan=False)]
TopCount = Annotated[int, Field(ge=0, le=MAX_LOGPROBS, strict=True)]
StringList = Annotated[list[str], Field(fail_fast=True)]
"""Validation stops at the first invalid element: collecting half a million errors would take seconds."""
TokenId = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]


class JsonSchema(BaseModel):
    """The schema that an answer follows."""

    model_config = ConfigDict(extra="ignore")
    json_schema: dict[str, Any] = Field(alias="schema")


class AnswerFormat(BaseModel):
    """The format of an answer: free text, any JSON object, or JSON that follows a schema."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class RequestBody(BaseModel):
    """Fields that both kinds of request have."""

    model_config = ConfigDict(extra="allow")
    model: str
    max_tokens: TokenCount | None = None
    temperature: Temperature | None = None
    top_p: Annotated[float, Field(gt=0, le=1, strict=True, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-SEED_BOUND, lt=SEED_BOUND, strict=True)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS, strict=True)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31, strict=True)] | None = None
    min_p: Fraction | None = None
    repetition_penalty: Penalty | None = None
    response_format: AnswerFormat | None = None
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

    @property
    def logprob_count(self) -> int | None:
        """Number of most probable tokens to report for each token; None: no log-probabilities."""
        return None

    @property
    def echoes(self) -> bool:
        """Whether the answer contains the prompt."""
        return False

    @property
    def schema_of_answer(self) -> Mapping[str, Any] | None:
        """The JSON schema that the answer follows; None: free text."""
        requested = self.response_format
        if requested is None or requested.type == "text":
            return None
        if requested.type == "json_object":
            return ANY_OBJECT
        if requested.json_schema is None:
            text = 'response_format: "json_schema" needs json_schema = {"name": ..., "schema": {...}}'
            raise RefusedError(400, text, "invalid_value", "response_format")
        return requested.json_schema.json_schema


class CompletionRequest(RequestBody):
    """A prompt to continue verbatim, or `row`: columns for the client's template, an extension of OpenAI's API."""

    prompt: str | StringList | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)] = ""
    echo: bool | None = None
    logprobs: Annotated[TopCount | None, BeforeValidator(_false_to_none)] = None
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

    def prompts(self) -> list[str | Ids]:
        """Return the prompts as texts or token ids. Raises RefusedError for a row beside a prompt, and for none."""
        if self.row and self.prompt:
            raise RefusedError(400, "row: send either row or prompt, not both", "invalid_value", "row")
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise RefusedError(400, "prompt: the list is empty", "invalid_value", "prompt")
        if isinstance(self.prompt[0], int):
            return [tuple(token for token in self.prompt if isinstance(token, int))]
        return [tuple(prompt) if isinstance(prompt, list) else str(prompt) for prompt in self.prompt]

    @property
    @override
    def logprob_count(self) -> int | None:
        return self.logprobs

    @property
    @override
    def echoes(self) -> bool:
        return bool(self.echo)


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
    logprobs: Annotated[bool, Field(strict=True)] | None = None
    top_logprobs: TopCount | None = None

    @property
    @override
    def logprob_count(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

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
    if isinstance(body, ChatRequest) and body.top_logprobs and not body.logprobs:
        raise RefusedError(400, f"top_logprobs: must be {RANGES['top_logprobs']}", "invalid_value", "top_logprobs")
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
