"""A generation request, the chunks of its answer, and its state inside the engine."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fedamole.model.batch import Ids
from fedamole.serving.json_grammar import JsonGrammar
from fedamole.serving.sampling import penalise_repetition, sample_token
from fedamole.serving.streaming_text import StreamingText
from fedamole.serving.token_logprobs import TokenLogprob, token_logprobs


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
    top_k: int = 0
    """Sample from this many most probable tokens; 0: from all."""
    min_p: float = 0.0
    """Do not sample tokens whose probability is below this fraction of the largest one."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that the prompt or the answer contains, and multiplies negative ones."""
    seed: int | None = None
    """Seed of the sampling; None: a random one."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer and are not part of it."""
    stream: bool = False
    """Whether the answer is passed on in chunks while it is generated."""
    logprobs: int | None = None
    """Number of most probable tokens that are reported for each token, with its own log-probability; None: no
    log-probabilities."""
    echo: bool = False
    """Whether the answer is a continuation of the prompt: white space around it stays, and log-probabilities begin with
    those of the prompt."""
    grammar: JsonGrammar | None = None
    """A grammar that the answer follows. It has a state, so that each request needs its own."""

    @property
    def changes_logits(self) -> bool:
        """Whether the most probable token is not always the next one of a greedy answer."""
        return self.repetition_penalty != 1 or self.grammar is not None


@dataclass(frozen=True)
class Chunk:
    """A part of an answer. The last one has the finish reason and the number of generated tokens."""

    text: str
    finish: Literal["stop", "length", "error"] | None = None
    tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    """Those of the tokens since the last chunk, including an end-of-text token and the tokens of a stop string."""


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
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """Log-probabilities that were not passed on yet."""

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

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of the prompt are needed when it is read."""
        return self.request.echo and self.request.logprobs is not None and not self.generated

    def next_token(self, logits: Tensor) -> int:
        """Return the next token, given logits (V)."""
        request = self.request
        if request.repetition_penalty != 1:
            logits = penalise_repetition(logits, (*request.prompt, *self.generated), request.repetition_penalty)
        if request.grammar is not None:
            logits = request.grammar.masked(logits)
        if self.generator is None:
            return int(logits.argmax())
        return sample_token(logits, request.temperature, request.top_p, self.generator, request.top_k, request.min_p)

    def record(self, token: int, logits: Tensor) -> None:
        """Keep the log-probability of a token if the request needs it, given the logits (V) that predict it."""
        if self.request.logprobs is not None:
            self.logprobs += token_logprobs(logits.unsqueeze(0), [token], self.request.logprobs)

    def score_prompt(self, first: int, logits: Tensor) -> None:
        """Keep the log-probabilities of prompt tokens, given logits (n, V).

        The first of them predicts the prompt's token `first` + 1 counted from its end, where the last one is -1.
        """
        top, prompt = self.request.logprobs, self.request.prompt
        assert top is not None
        # Indices of the tokens that the logits predict; those before the prompt and after its end are left out.
        start = first + 1 + len(prompt)
        begin, end = max(start, 1), min(start + len(logits), len(prompt))
        if begin < end:
            self.logprobs += token_logprobs(logits[begin - start : end - start], prompt[begin:end], top)

    def take_logprobs(self) -> tuple[TokenLogprob, ...]:
        """Return the log-probabilities that were not passed on yet, and forget them."""
        taken = tuple(self.logprobs)
        self.logprobs.clear()
        return taken

    def cancel(self) -> None:
        """Drop the request at the next step. Callable from any thread."""
        self.closed = True
