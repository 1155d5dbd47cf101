"""One thread that owns the bank and answers everybody: every step advances all requests under way by a token.

Between two steps those that are answered, or whose client went away, leave, and those that wait join (turns.py says
who). Whatever goes wrong with one request fails this request alone; the engine goes on.
"""

import contextlib
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fedamole.errors import FedamoleError
from fedamole.model.bank import Bank
from fedamole.model.batch import Ids
from fedamole.model.params import Adapter
from fedamole.serving.decode_batch import Running, check
from fedamole.serving.scheduling import Limits, Turns
from fedamole.serving.streaming_text import Growing
from fedamole.terminal import printable

log = logging.getLogger(__name__)

TRIES = 3
"""Steps that may fail with a request before it fails as well."""


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
    before: int = 0
    """Tokens that it had made when it joined last."""
    tries: int = 0
    """Steps that failed with it."""

    @property
    def client(self) -> int:
        """Place of its client in the bank."""
        return self.wanted.client

    @property
    def longest(self) -> int:
        """Tokens that it may come to."""
        return len(self.prompt) + self.limit

    @property
    def had(self) -> int:
        """Tokens that it made since it joined last."""
        return len(self.made) - self.before

    def leave(self) -> None:
        """Nobody waits for the answer any more; from any thread."""
        self.gone = True


class Engine:
    """Answers requests for the models of C clients; `together` counts the steps that advanced n clients at once."""

    def __init__(self, bank: Bank, adapters: Sequence[Adapter], limits: Limits | None = None) -> None:
        """Load the adapters; BaseModelError for a base on which requests cannot be batched. `start` begins to work."""
        self.bank, self.limits = bank, limits or Limits()
        bank.load(adapters)
        check(bank)
        self.together: Counter[int] = Counter()
        self._running = Running[Request](bank)
        self._turns = Turns[Request](self.limits)
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
        self._give_up([*self._running.rows, *self._turns.waiting])
        self._turns.waiting.clear()

    @property
    def under_way(self) -> int:
        """Requests that are being answered."""
        return len(self._running.rows)

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._turns.waiting)

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
            generator.seed() if wanted.seed is None else generator.manual_seed(wanted.seed)
        request = Request(
            wanted,
            tell,
            self.bank.prefix(wanted.prompt),
            min(wanted.limit, self.limits.answer, self.room(wanted.prompt)),
            Growing(lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)), wanted.stop),
            generator,
        )
        with self._news:
            if self.stopped:
                raise StoppedError("the server is stopping; ask again later")
            self._turns.add(request)
            self._news.notify()
        return request

    def turn(self) -> bool:
        """Let those who wait join and advance everybody by a token; whether anybody is left. The thread calls it."""
        with self._news:
            joining, aside = self._turns.next(self._running.rows)
        self._running.keep([not (request.gone or request in aside) for request in self._running.rows])
        if joining:
            self._join(joining)
        if self._running.rows:
            self._step()
        return bool(self._running.rows or self._turns.waiting)

    def _work(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self.stopped or self._turns.waiting or self._running.rows)
                if self.stopped:
                    return
            try:
                self.turn()
            except Exception as error:  # no request in particular is to blame, so all begin anew
                with self._news:
                    concerned = [*self._running.rows, *self._turns.waiting]
                    self._running, self._turns = Running(self.bank), Turns(self.limits)
                self._fail(concerned, error)

    def _join(self, requests: Sequence[Request]) -> None:
        """Read requests together; where that fails, each by itself, so that only those fail that cannot be read."""
        for request in requests:
            request.before = len(request.made)
        try:
            logits = self._running.join(requests)
        except Exception as error:
            if len(requests) == 1:
                self._fail(requests, error)
                return
            for request in requests:
                self._join([request])
            return
        self._take(requests, logits)

    def _step(self) -> None:
        """Advance all rows by a token; where that fails, read each of them anew by itself."""
        rows = self._running.rows
        self.together[len({request.client for request in rows})] += 1
        try:
            logits = self._running.step([request.made[-1] for request in rows])
        except Exception as error:
            self._running = Running(self.bank)  # a step that was broken off leaves caches of different lengths
            for request in rows:
                request.tries += 1
            self._fail([request for request in rows if request.tries >= TRIES], error)
            for request in rows:
                if not request.gone:
                    self._join([request])
            return
        self._take(rows, logits)

    def _fail(self, requests: Sequence[Request], error: Exception) -> None:
        """Log what went wrong, without its text, which may quote a prompt; and give the requests up."""
        for request in requests:
            if not request.gone:
                log.error("a request failed: %s", printable(said(error)))
        self._give_up(requests)

    def _give_up(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if not request.gone:
                request.gone = True
                with contextlib.suppress(Exception):  # whoever cannot be told has gone
                    request.tell(Piece("", "error"))

    def _take(self, requests: Sequence[Request], logits: Tensor) -> None:
        """Give each request its next token, from logits (n, V); those that have ended leave.

        Each row is sampled by itself, and what goes wrong with it fails its own request alone.
        """
        values, likeliest = logits.float().max(1)
        for place, (largest, token) in enumerate(zip(values.tolist(), likeliest.tolist(), strict=True)):
            request = requests[place]
            try:
                if not math.isfinite(largest):
                    raise FloatingPointError("the model's numbers are no longer finite")
                if request.generator is not None:
                    wanted = request.wanted
                    token = drawn(logits[place], wanted.temperature, wanted.top_p, request.generator)
                self._advance(request, token)
            except Exception as error:
                self._fail([request], error)
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
            told = piece if request.wanted.pieces else request.text.shown
            request.tell(Piece(told, finish, len(request.made)))
            request.gone = True
        elif piece and request.wanted.pieces:
            request.tell(Piece(piece))


def drawn(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Draw a token from logits (V) divided by `temperature`, of the most probable ones that reach `top_p` together.

    The largest logit is taken away first, so that a low temperature makes none of them infinite.
    """
    logits = logits.float().cpu()
    logits = (logits - logits.max()) / temperature
    probabilities, tokens = torch.softmax(logits, 0).sort(descending=True, stable=True)
    before = probabilities.cumsum(0) - probabilities
    kept = probabilities.masked_fill(before >= top_p, 0)
    kept[0] = probabilities[0]
    return int(tokens[torch.multinomial(kept, 1, generator=generator)])


def said(error: Exception) -> str:
    """The kind of an error and the line where it was raised. Its message is left out: it may quote what was asked."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = "" if trace is None else f" in {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
    return f"{type(error).__name__}{where}"
