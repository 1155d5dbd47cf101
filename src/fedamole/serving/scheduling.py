"""Fair scheduling of requests: which waiting requests join the batch, and which running ones are preempted for them.

A client is one model, and one API key if the server has keys. Clients take turns: next is the client with the fewest
running requests and, among equals, the one that was scheduled least recently. If the batch is full, a running request
of another client is preempted. It keeps the tokens generated so far and continues later. Preempted is

- the latest request of a client that runs at least two more requests than the waiting client; or
- if the waiting client runs none, any request that has generated SLICE tokens since it joined.

So a client's short request waits a few steps for another client's hundred long requests, not for their answers.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from fedamole.errors import FedamoleError

SLICE = 64
"""Tokens that a request generates before it can be preempted for a client that runs no request."""


class BusyError(FedamoleError):
    """The queue for a model is full."""


@dataclass(frozen=True)
class Limits:
    """Limits of an inference engine. `fedamole serve` takes its defaults from here."""

    max_rows: int = 32
    """Maximum number of requests in the batch."""
    max_tokens: int = 8192
    """Maximum number of tokens in the key-value cache, including padding and tokens still to be generated. A single
    request always runs, whatever its length."""
    max_answer_tokens: int = 1024
    """Maximum length of an answer, whatever the request asks for."""
    max_waiting: int = 64
    """Maximum number of waiting requests per client."""
    max_rows_per_client: int | None = None
    """Maximum number of requests of one client in the batch; None: `max_rows`."""


class QueuedRequest(Protocol):
    """What the scheduler reads of a request."""

    closed: bool

    @property
    def client(self) -> int:
        """Index of the client."""

    @property
    def max_length(self) -> int:
        """Maximum number of tokens of prompt and answer."""

    @property
    def tokens_since_join(self) -> int:
        """Tokens generated since the request joined the batch."""


T = TypeVar("T", bound=QueuedRequest)


class FairQueue(Generic[T]):
    """The waiting requests. Not thread-safe."""

    def __init__(self, limits: Limits) -> None:
        """Start with an empty queue."""
        self.limits = limits
        self.waiting: list[T] = []
        """In the order in which each client's requests run: preempted ones first."""
        self._last_scheduled: dict[int, int] = {}
        """By client, the value of `_count` when it was scheduled last."""
        self._count = 0

    def add(self, request: T) -> None:
        """Append a request. Raises BusyError if too many requests of its client are waiting."""
        self.add_all([request])

    def add_all(self, requests: Sequence[T]) -> None:
        """Append all requests of one client, or none: BusyError if too many would be waiting."""
        client = requests[0].client
        waiting = sum(other.client == client and not other.closed for other in self.waiting)
        if waiting + len(requests) > self.limits.max_waiting:
            limit = self.limits.max_waiting
            if len(requests) == 1:
                raise BusyError(f"{limit} requests for this model are waiting already; try again later")
            text = f"{waiting} answers of this model are waiting, of at most {limit}; {len(requests)} more do not fit"
            raise BusyError(f"{text}; try again later")
        self.waiting += requests

    def schedule(self, running: Sequence[T]) -> tuple[list[T], list[T]]:
        """Return the requests that join the batch, and the `running` ones that are preempted and wait again.

        If the next request does not fit, no request behind it is scheduled in its place.
        """
        self.waiting = [request for request in self.waiting if not request.closed]
        staying, joining, preempted = [row for row in running if not row.closed], list[T](), list[T]()
        while (request := self._next(Counter(row.client for row in staying))) is not None:
            leaving = self._to_preempt(staying, request)
            if leaving is None:
                break
            self._count += 1
            self._last_scheduled[request.client] = self._count
            self.waiting.remove(request)
            joining.append(request)
            preempted += leaving
            staying = [*(row for row in staying if row not in leaving), request]
        self.waiting = preempted + self.waiting
        return joining, preempted

    def _next(self, running: Counter[int]) -> T | None:
        """The next request to run, given the number of running requests by client."""
        limit = self.limits.max_rows_per_client or self.limits.max_rows
        eligible = [request for request in self.waiting if running[request.client] < limit]

        def priority(request: T) -> tuple[int, int]:
            return running[request.client], self._last_scheduled.get(request.client, 0)

        return min(eligible, key=priority, default=None)

    def _to_preempt(self, rows: Sequence[T], request: T) -> list[T] | None:
        """The rows to preempt so that a request fits; None if it has to wait."""
        staying, leaving = list(rows), list[T]()
        counts = Counter(row.client for row in rows)
        own = counts[request.client]
        while staying and not self._fits(staying, request):
            preemptible = [
                row for row in staying if counts[row.client] > own + 1 or (own == 0 and row.tokens_since_join >= SLICE)
            ]
            if not preemptible:
                return None
            row = max(reversed(preemptible), key=lambda candidate: counts[candidate.client])
            counts[row.client] -= 1
            staying.remove(row)
            leaving.append(row)
        return leaving

    def _fits(self, rows: Sequence[T], request: T) -> bool:
        tokens = max(row.max_length for row in (*rows, request)) * (len(rows) + 1)
        return len(rows) < self.limits.max_rows and tokens <= self.limits.max_tokens
