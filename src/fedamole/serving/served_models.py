"""The models of a server, each with the engine that answers for it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from fedamole.personal.generate import PromptFormat
from fedamole.serving.engine import InferenceEngine
from fedamole.serving.keys import ApiKeys

METRICS_OWNER = "/metrics"
"""Owner of the API key that may read /metrics. It can be the name of no model."""


@dataclass(frozen=True)
class ServedModel:
    """One model of a server."""

    name: str
    """The `model` of requests: the client, or run/client if the server has several runs."""
    engine: InferenceEngine
    index: int
    """Index of the model among the clients of its engine."""
    prompt_format: PromptFormat
    """How rows and conversations become prompts."""
    max_new_tokens: int
    """Maximum length of an answer if the request sets none."""
    created: int
    """Unix time at which it was saved."""


@dataclass(frozen=True)
class ServiceSettings:
    """Access and features of the HTTP API."""

    keys: ApiKeys | None = None
    """None: no keys are needed; only requests to a loopback address are answered, and for every model."""
    per_minute: int | None = None
    """Maximum tokens of prompts and answers per caller and minute; None: no limit."""
    origins: tuple[str, ...] = ()
    """Origins of web pages whose scripts may read answers (CORS)."""
    metrics: bool = False
    """Whether /metrics exists. If there are keys, it needs the key of METRICS_OWNER."""
    log_requests: bool = False
    """Whether each request is logged, without its texts."""
    docs_page: bool = False
    """Whether /docs exists: a page that loads Swagger UI from another host."""


@dataclass(frozen=True)
class ServedModels:
    """The models of a server and their engines, by name."""

    models: tuple[ServedModel, ...]
    by_name: dict[str, ServedModel] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_name", {model.name: model for model in self.models})

    @property
    def engines(self) -> tuple[InferenceEngine, ...]:
        """The engines, each once."""
        return tuple(dict.fromkeys(model.engine for model in self.models))


def models_of_engine(
    engine: InferenceEngine, names: Sequence[str], formats: Sequence[PromptFormat], max_new_tokens: int, created: int
) -> list[ServedModel]:
    """Return the models of one engine, given its clients' names and prompt formats in the engine's order."""
    return [
        ServedModel(name, engine, index, prompt_format, max_new_tokens, created)
        for index, (name, prompt_format) in enumerate(zip(names, formats, strict=True))
    ]
