"""Limits per caller: open requests, bytes of request bodies, prompts tokenised at once, tokens per minute.

A caller is an API key, or the address of a connection if the server runs without keys.
"""

import asyncio
import time
from collections.abc import Callable

from fedamole.serving.protocol import RefusedError

MAX_BODY_BYTES_PER_CALLER = 8 * 2**20
"""Maximum total size of a caller's request bodies that are being received or tokenised."""
MAX_TOKENISING_PER_CALLER = 2
"""Maximum number of a caller's request bodies that are tokenised at the same time. Others wait."""


class TokenBucket:
    """A token bucket: `per_minute` tokens of capacity, refilled at `per_minute` tokens per minute."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with a full bucket."""
        self.per_minute, self._clock = per_minute, clock
        self._tokens, self._updated = float(per_minute), clock()

    def take(self, tokens: int) -> None:
        """Remove tokens. Raises RefusedError: 429 if there are too few at the moment, 400 if there never are enough."""
        if tokens > self.per_minute:
            text = f"the request may use {tokens} tokens; the limit is {self.per_minute} per minute. Ask for fewer"
            raise RefusedError(400, text, "too_many_tokens")
        now = self._clock()
        self._tokens = min(self.per_minute, self._tokens + (now - self._updated) * self.per_minute / 60)
        self._updated = now
        if tokens > self._tokens:
            text = f"the limit of {self.per_minute} tokens per minute is reached; try again later"
            wait = (tokens - self._tokens) * 60 / self.per_minute
            raise RefusedError(429, text, "rate_limit_exceeded", retry=wait)
        self._tokens -= tokens

    def give_back(self, tokens: int) -> None:
        """Return tokens that an answer did not use."""
        self._tokens += tokens


class CallerUsage:
    """What one caller uses at the moment."""

    def __init__(self, per_minute: int | None) -> None:
        """Start with no usage; `per_minute` limits the tokens per minute (None: no limit)."""
        self.bucket = None if per_minute is None else TokenBucket(per_minute)
        self.tokenising = asyncio.Semaphore(MAX_TOKENISING_PER_CALLER)
        self.open_requests = 0
        self._body_bytes = 0

    def open_requests_up_to(self, max_open: int, count: int = 1) -> None:
        """Count more open answers, until `close_requests`. Raises RefusedError if more than `max_open` would be."""
        if self.open_requests + count > max_open:
            text = f"{self.open_requests} of your requests are open already; try again later"
            raise RefusedError(429, text, "rate_limit_exceeded")
        self.open_requests += count

    def close_requests(self, count: int) -> None:
        """Count fewer open answers."""
        self.open_requests -= count

    def add_body_bytes(self, size: int) -> None:
        """Count bytes of request bodies, a negative `size` when they are released. Raises RefusedError for too many."""
        if size > 0 and self._body_bytes + size > MAX_BODY_BYTES_PER_CALLER:
            text = f"your request bodies exceed {MAX_BODY_BYTES_PER_CALLER} bytes in total; try again later"
            raise RefusedError(429, text, "rate_limit_exceeded")
        self._body_bytes += size
