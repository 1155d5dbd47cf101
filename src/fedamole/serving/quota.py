"""How much one caller may use: requests open, bytes on their way in, prompts prepared at once, tokens per minute.

A caller is a key; without keys it is the address that a connection comes from.
"""

import asyncio
import time
from collections.abc import Callable

from fedamole.serving.protocol import RefusedError

BODIES = 8 * 2**20
"""Most bytes of one caller's bodies that are held at once, until they have become prompts."""
AT_ONCE = 2
"""Most bodies of one caller that are made into prompts at once; more wait."""


class Allowance:
    """Tokens per minute: a store that fills evenly, up to what a minute allows."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with a full store."""
        self.per_minute, self._clock = per_minute, clock
        self._left, self._when = float(per_minute), clock()

    def take(self, tokens: int) -> None:
        """Take tokens out of the store; RefusedError where it has too few, or could never have enough."""
        if tokens > self.per_minute:
            text = f"the request may come to {tokens} tokens, a minute allows {self.per_minute}; ask for less"
            raise RefusedError(400, text, "too_many_tokens")
        now = self._clock()
        self._left = min(self.per_minute, self._left + (now - self._when) * self.per_minute / 60)
        self._when = now
        if tokens > self._left:
            text = f"{self.per_minute} tokens per minute are used up; ask again later"
            wait = (tokens - self._left) * 60 / self.per_minute
            raise RefusedError(429, text, "rate_limit_exceeded", retry=wait)
        self._left -= tokens

    def give_back(self, tokens: int) -> None:
        """Put back what an answer did not need."""
        self._left += tokens


class Caller:
    """What one caller uses now."""

    def __init__(self, per_minute: int | None) -> None:
        """Begin with nothing; `per_minute` tokens may be used in a minute, None: any number."""
        self.allowance = None if per_minute is None else Allowance(per_minute)
        self.preparing = asyncio.Semaphore(AT_ONCE)
        self.open = 0
        self._bytes = 0

    def enter(self, most: int) -> None:
        """Open a request; RefusedError where `most` are open. To be followed by `leave`."""
        if self.open >= most:
            text = f"{most} requests of yours are open already; ask again later"
            raise RefusedError(429, text, "rate_limit_exceeded")
        self.open += 1

    def leave(self) -> None:
        """Close a request."""
        self.open -= 1

    def hold(self, size: int) -> None:
        """Count bytes of a body that came in, or, below 0, that are needed no more; RefusedError for too many."""
        if size > 0 and self._bytes + size > BODIES:
            raise RefusedError(429, f"your bodies come to over {BODIES} bytes; ask again later", "rate_limit_exceeded")
        self._bytes += size
