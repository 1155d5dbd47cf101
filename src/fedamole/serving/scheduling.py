"""Who is answered next: fair turns among clients for the places that there are.

A client is one model, and with keys one key. Clients take turns: whoever has fewest requests under way is next, and
among equals whoever has had no turn for longest. Where there is no room, a request of another client is set aside,
with what it has of its answer, and goes on later: the latest one of a client with at least two more under way; or, for
a client with none under way, one that got its slice of tokens. So a client with a hundred long requests delays another
client's short one by a step or a slice, and not by an answer.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from fedamole.errors import FedamoleError

SLICE = 64
"""Tokens after which a request makes room for a client that has none under way."""


class BusyError(FedamoleError):
    """A request that finds no room to wait in."""


@dataclass(frozen=True)
class Limits:
    """How much is held at once."""

    rows: int = 32
    """Most requests under way."""
    tokens: int = 8192
    """Most tokens in the cache, padding and tokens to come included; one request may always be under way."""
    answer: int = 1024
    """Most tokens of an answer, whatever is asked for."""
    waiting: int = 64
    """Most requests of one client that wait."""
    each: int | None = None
    """Most requests of one client under way; None: as many as there are places."""


class Turn(Protocol):
    """What is read of a request."""

    gone: bool

    @property
    def client(self) -> int:
        """Whose it is."""

    @property
    def longest(self) -> int:
        """Tokens that it may come to."""

    @property
    def had(self) -> int:
        """Tokens that it got since it joined."""


T = TypeVar("T", bound=Turn)


class Turns(Generic[T]):
    """The requests that wait. Not safe against several threads at once."""

    def __init__(self, limits: Limits) -> None:
        """Begin with none."""
        self.limits = limits
        self.waiting: list[T] = []
        """In the order in which they go on, for each client: those that were set aside first."""
        self._last: dict[int, int] = {}
        """For each client, the number of the turn that it had last."""
        self._turns = 0

    def add(self, request: T) -> None:
        """Have a request wait. Raises BusyError where too many of its client do."""
        if sum(one.client == request.client and not one.gone for one in self.waiting) >= self.limits.waiting:
            raise BusyError(f"{self.limits.waiting} requests for this model wait already; ask again later")
        self.waiting.append(request)

    def next(self, rows: Sequence[T]) -> tuple[list[T], list[T]]:
        """Choose who joins the `rows` under way, and which of the rows are set aside for that; these wait again.

        Nobody overtakes the next one for want of room.
        """
        self.waiting = [request for request in self.waiting if not request.gone]
        stay, joining, aside = [row for row in rows if not row.gone], list[T](), list[T]()
        while (request := self._first(Counter(row.client for row in stay))) is not None:
            leaving = self._in_the_way(stay, request)
            if leaving is None:
                break
            self._turns += 1
            self._last[request.client] = self._turns
            self.waiting.remove(request)
            joining.append(request)
            aside += leaving
            stay = [*(row for row in stay if row not in leaving), request]
        self.waiting = aside + self.waiting
        return joining, aside

    def _first(self, under_way: Counter[int]) -> T | None:
        most = self.limits.each or self.limits.rows
        able = [one for one in self.waiting if under_way[one.client] < most]
        return min(able, key=lambda one: (under_way[one.client], self._last.get(one.client, 0)), default=None)

    def _in_the_way(self, rows: Sequence[T], request: T) -> list[T] | None:
        """The rows that have to be set aside, so that a request can join; None where it has to wait."""
        stay, leaving = list(rows), list[T]()
        counts = Counter(row.client for row in rows)
        mine = counts[request.client]
        while stay and not self._fits(stay, request):
            able = [row for row in stay if counts[row.client] > mine + 1 or (mine == 0 and row.had >= SLICE)]
            if not able:
                return None
            row = max(reversed(able), key=lambda one: counts[one.client])
            counts[row.client] -= 1
            stay.remove(row)
            leaving.append(row)
        return leaving

    def _fits(self, rows: Sequence[T], request: T) -> bool:
        tokens = max(one.longest for one in (*rows, request)) * (len(rows) + 1)
        return len(rows) < self.limits.rows and tokens <= self.limits.tokens
