"""The interface to clients on other machines, and how long the engine waits for them."""

from collections.abc import Collection, Mapping
from typing import Protocol

POLL_SECONDS = 0.1
"""Interval between two checks for answers."""
RETRY_SECONDS = 3.0
"""Time after which a client whose failure may pass is asked again."""
REFUSED_SECONDS = 60.0
"""Time after which a node that was refused, or that has not answered a request to join, is asked again."""
RESEND_AFTER = 0.1
"""Resend after this fraction of the deadline; requests are idempotent."""
MAX_OPEN_JOINS = 4
"""Maximum number of unanswered requests to join per node, so that a slow client is not flooded."""
TEST_ATTEMPTS = 3
"""Number of times that a client is asked for its test scores."""
OVERHEAD_BYTES = 1 << 20
"""Maximum size of an answer beyond the method's reply."""


class Link(Protocol):
    """Sends bytes to nodes on other machines and receives their answers."""

    def nodes(self) -> Mapping[int, str]:
        """Return the nodes that are online with their registered names; a name is empty if there is none."""

    def send(self, node: int, payload: bytes, round_: int, seconds: float) -> str:
        """Send bytes to a node, which has `seconds` to answer; return a ticket for the answer."""

    def receive(self, tickets: Collection[str]) -> Mapping[str, bytes | str]:
        """Return the answers that have arrived for these tickets: bytes, or a key of FAILURES; each only once."""
