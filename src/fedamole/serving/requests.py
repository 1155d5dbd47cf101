"""A generation request, the chunks of its answer, and its state inside the engine."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from fedamole.model.batch import Ids
from fedamole.serving.streaming_text import StreamingText


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt for one client's model, with sampling parameters."""

    client: int
    """Index of the model among the served ones."""
    prompt: Ids
    """Token ids, without virtual tokens."""
    max_new_tokens: int
    """At least 1."""
    temperature: float = 0.0
    """0 selects the most probable token."""
    top_p: float = 1.0
    """Sample from the smallest set of most probable tokens whose total probability reaches this value."""
    seed: int | None = None
    """Seed of the sampling; None: a random one."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer and are not part of it."""
    stream: bool = False
    """Whether the answer is passed on in chunks while it is generated."""


@dataclass(frozen=True)
class Chunk:
    """A part of an answer. The last one has the finish reason and the number of generated tokens."""

    text: str
    finish: Literal["stop", "length", "error"] | None = None
    tokens: int = 0


@dataclass(eq=False)
class RequestState:
    """A request in the engine, waiting or running.

    `on_chunk` is called in the engine's thread, and for the last time with a `finish` reason.
    """

    request: GenerationRequest
    on_chunk: Callable[[Chunk], object]
    prompt: Ids
    """Token ids that the base reads, including virtual tokens."""
    max_new_tokens: int
    """The request's limit, reduced to the engine's limit and the positions of the base."""
    text: StreamingText
    generator: torch.Generator | None
    generated: list[int] = field(default_factory=list)
    """Token ids of the answer so far."""
    closed: bool = False
    """Whether it is finished, failed or cancelled."""
    generated_at_join: int = 0
    """Number of tokens generated before it joined the batch the last time."""
    failed_steps: int = 0

    @property
    def client(self) -> int:
        """Index of the client in the bank."""
        return self.request.client

    @property
    def max_length(self) -> int:
        """Maximum number of tokens of prompt and answer."""
        return len(self.prompt) + self.max_new_tokens

    @property
    def tokens_since_join(self) -> int:
        """Tokens generated since it joined the batch the last time."""
        return len(self.generated) - self.generated_at_join

    def cancel(self) -> None:
        """Drop the request at the next step. Callable from any thread."""
        self.closed = True
