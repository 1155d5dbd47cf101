"""One thread that owns the bank and answers everybody: every step advances all requests under way by a token.

Between two steps those that are answered, or whose client went away, leave, and those that wait join. Whoever has
fewest requests under way is next, and among equals who came first; nobody overtakes the next one for want of room.
"""

import logging
import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fedamole.errors import FedamoleError
from fedamole.model.bank import Bank
from fedamole.model.batch import Ids
from fedamole.model.params import Adapter
from fedamole.serving.running import Running, check
from fedamole.serving.text import Growing

log = logging.getLogger(__name__)


class BusyError(FedamoleError):
    """A request that finds no room to wait in."""


class StoppedError(FedamoleError):
    """A request to an engine that answers no more."""


@dataclass(frozen=True)
class Wanted:
    """What a request asks for."""

    client: int
    """Whose model, by its place among those that are served."""
    prompt: Ids
    """Token ids of the prompt as given."""
    limit: int
    """Most tokens of the answer, at least 1."""
    temperature: float = 0.0
    """0 takes the most probable token."""
    top_p: float = 1.0
    """Tokens are drawn from the fewest most probable ones that have this probability together."""
    seed: int | None = None
    """The same seed draws the same answer; None: another one each time."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer and are no part of it."""
    pieces: bool = False
    """Whether the answer is told in pieces as it grows."""


@dataclass(frozen=True)
class Piece:
    """What is told of an answer: more of its text, and at its end why it ended and how many tokens it took."""

    text: str
    finish: Literal["stop", "length", "error"] | None = None
    tokens: int = 0


@dataclass(eq=False)
class Request:
    """A request on its way; `tell` is called from the engine's thread, the last time with a `finish`."""

    wanted: Wanted
    tell: Callable[[Piece], object]
    prompt: Ids
    """Token ids as the base reads them, with virtual tokens."""
    limit: int
    """Most tokens, as far as the limits and the base's positions go."""
    text: Growing
    generator: torch.Generator | None
    made: list[int] = field(default_factory=list)
    gone: bool = False

    @property
    def client(self) -> int:
        """Place of its client in the bank."""
        return self.wanted.client

    @property
    def longest(self) -> int:
        """Tokens that it may come to."""
        return len(self.prompt) + self.limit

    def leave(self) -> None:
        """Nobody waits for the answer any more; from any thread."""
        self.gone = True


@dataclass(frozen=True)
class Limits:
    """How much is held at once."""

    rows: int = 32
    """Most requests under way."""
    tokens: int = 8192
    """Most tokens in the cache, padding and tokens to come included; one request may always be under way."""
    answer: int = 1024
    """Most tokens of an answer, whatever is asked for: a long one keeps others from joining."""
    waiting: int = 64
    """Most requests of one client that wait."""


class Engine:
    """Answers requests for the models of C clients; `together` counts the steps that advanced n clients at once."""

    def __init__(self, bank: Bank, adapters: Sequence[Adapter], limits: Limits | None = None) -> None:
        """Load the adapters; BaseModelError for a base on which requests cannot be batched. `start` begins to work."""
        self.bank, self.limits = bank, limits or Limits()
        bank.load(adapters)
        check(bank)
        self.together: Counter[int] = Counter()
        self._running = Running[Request](bank)
        self._waiting: deque[Request] = deque()
        self._news = threading.Condition()
        self.stopped = False
        """Whether it answers no more."""
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Answer no more; whoever waits is told. Returns when the thread has ended, after a step at most."""
        with self._news:
            self.stopped = True
            self._news.notify()
        if self._thread.is_alive():
            self._thread.join()
        self._give_up([*self._running.rows, *self._waiting])
        self._waiting.clear()

    @property
    def under_way(self) -> int:
        """Requests that are being answered."""
        return len(self._running.rows)

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def room(self, prompt: Ids) -> int:
        """Tokens that the base has positions for after a prompt; 0 where the prompt itself is too long.

        A prompt that takes all positions leaves room for one token, which needs none itself.
        """
        left = self.bank.base.max_positions - len(self.bank.prefix(prompt))
        return max(1, left) if left >= 0 else 0

    def submit(self, wanted: Wanted, tell: Callable[[Piece], object]) -> Request:
        """Have a request wait for its turn. Raises BusyError and StoppedError."""
        tokenizer = self.bank.base.tokenizer
        generator = None
        if wanted.temperature > 0:
            generator = torch.Generator()
            generator.seed() if wanted.seed is None else generator.manual_seed(wanted.seed % 2**63)
        request = Request(
            wanted, tell, self.bank.prefix(wanted.prompt),
            min(wanted.limit, self.limits.answer, self.room(wanted.prompt)),
            Growing(lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)), wanted.stop), generator,
        )
        with self._news:
            if self.stopped:
                raise StoppedError("the server is stopping; ask again later")
            if sum(one.client == wanted.client for one in self._waiting) >= self.limits.waiting:
                raise BusyError(f"{self.limits.waiting} requests for this model wait already; ask again later")
            self._waiting.append(request)
            self._news.notify()
        return request

    def turn(self) -> bool:
        """Let those who wait join and advance everybody by a token; whether anybody is left. The thread calls it."""
        with self._news:
            joining = self._next()
        if joining:
            self._safely(partial(self._join, joining), joining)
        if rows := self._running.rows:
            self._safely(self._step, rows)
        return bool(self._running.rows or self._waiting)

    def _work(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self.stopped or self._waiting or self._running.rows)
                if self.stopped:
                    return
            self.turn()

    def _safely(self, work: Callable[[], None], concerned: Sequence[Request]) -> None:
        """Whatever goes wrong, only these requests fail (memory that runs out, above all); the engine goes on."""
        try:
            work()
        except Exception as error:
            log.error("%d requests failed: %s: %s", len(concerned), type(error).__name__, error)
            self._give_up(concerned)

    def _give_up(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if not request.gone:
                request.gone = True
                request.tell(Piece("", "error"))

    def _next(self) -> list[Request]:
        """Take those who may join now from the waiting ones."""
        for request in [request for request in self._waiting if request.gone]:
            self._waiting.remove(request)
        rows = [request for request in self._running.rows if not request.gone]
        joining: list[Request] = []
        while self._waiting and len(rows) < self.limits.rows:
            under_way = Counter(request.client for request in rows)
            request = min(self._waiting, key=lambda one: under_way[one.client])
            tokens = max(one.longest for one in (*rows, request)) * (len(rows) + 1)
            if rows and tokens > self.limits.tokens:
                break
            self._waiting.remove(request)
            joining.append(request)
            rows.append(request)
        return joining

    def _join(self, requests: Sequence[Request]) -> None:
        self._take(requests, self._running.join(requests))

    def _step(self) -> None:
        self._running.keep([not request.gone for request in self._running.rows])
        if rows := self._running.rows:
            self.together[len({request.client for request in rows})] += 1
            self._take(rows, self._running.step([request.made[-1] for request in rows]))

    def _take(self, requests: Sequence[Request], logits: Tensor) -> None:
        """Give each request its next token, from logits (n, V); those that have ended leave.

        A model whose numbers are no longer finite fails its own requests alone.
        """
        values, likeliest = logits.float().max(1)
        for place, (largest, token) in enumerate(zip(values.tolist(), likeliest.tolist(), strict=True)):
            request = requests[place]
            wanted = request.wanted
            if not math.isfinite(largest):
                self._give_up([request])
                continue
            if request.generator is not None:
                token = drawn(logits[place], wanted.temperature, wanted.top_p, request.generator)
            self._advance(request, token)
        self._running.keep([not request.gone for request in self._running.rows])

    def _advance(self, request: Request, token: int) -> None:
        finish: Literal["stop", "length"] | None = None
        if token == self.bank.base.tokenizer.eos_token_id:
            finish = "stop"
        else:
            request.made.append(token)
            finish = "length" if len(request.made) >= request.limit else None
        piece = ""
        if request.wanted.pieces or request.wanted.stop or finish:
            piece, stopped = request.text.grow(request.made, finish is not None)
            finish = "stop" if stopped else finish
        if finish is not None:
            request.gone = True
            told = piece if request.wanted.pieces else request.text.shown
            request.tell(Piece(told, finish, len(request.made)))
        elif piece and request.wanted.pieces:
            request.tell(Piece(piece))


def drawn(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Draw a token from logits (V) divided by `temperature`, of the most probable ones that reach `top_p` together."""
    probabilities, tokens = torch.softmax(logits.float().cpu() / temperature, 0).sort(descending=True, stable=True)
    before = probabilities.cumsum(0) - probabilities
    kept = probabilities.masked_fill(before >= top_p, 0)
    kept[0] = probabilities[0]
    return int(tokens[torch.multinomial(kept, 1, generator=generator)])
