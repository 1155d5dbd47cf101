"""Access checks and limits of the gateway, made on a request's header before its body is read."""

import binascii
import logging
import time
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from starlette.datastructures import Headers

from fedamole.deployment.security.roster import RegisteredClient, Roster

KIB, MIB = 2**10, 2**20

PUSH_OBJECT, PUSH_MESSAGES = b"/v1/fleet/push-object", b"/v1/fleet/push-messages"

BODY_LIMITS = {
    b"/v1/fleet/activate-node": 64 * KIB,
    b"/v1/fleet/deactivate-node": 64 * KIB,
    b"/v1/fleet/send-node-heartbeat": 64 * KIB,
    b"/v1/fleet/pull-messages": 64 * KIB,
    b"/v1/fleet/pull-object": 64 * KIB,
    b"/v1/fleet/confirm-message-received": 64 * KIB,
    PUSH_MESSAGES: MIB,
    PUSH_OBJECT: 16 * MIB,
}
"""The allowed calls of Flower's Fleet API, each with its maximum body size in bytes.

Not allowed are register-node and unregister-node, which would admit nodes without a registered key, and get-run and
get-fab, with which a node downloads an app to run. push-messages is read completely and parsed: 1 MiB describes a reply
of 60 GiB in objects of 5 MiB, and limits the cost of parsing.
"""

HEAD_BYTES, HEAD_LINES = 8 * KIB, 64
"""Maximum size of a request header in bytes (including the target), and maximum number of headers. A client sends about
1 KiB."""

KEY_BYTES, TOTAL_BYTES = 48 * MIB, 256 * MIB
"""Maximum bytes of bodies in transit to the SuperLink at the same time: per key, and in total."""

KEY_HEADER, TIMESTAMP_HEADER, SIGNATURE_HEADER = "flwr-public-key", "flwr-timestamp", "flwr-signature"
"""Headers of a node's signature. They and the time window repeat Flower's constants; a test compares them."""

MAX_AGE_S, MIN_AGE_S = 305, -5
"""Range of the age of a signed timestamp in seconds, both ends excluded; a negative age is a clock that is ahead."""

MAX_LINES, LINES_WINDOW_S = 30, 10.0
"""Maximum number of log lines about one source per time window in seconds."""


class RefusedError(Exception):
    """A refused call: the HTTP status, the error word of the JSON body, and the reason for the log."""

    def __init__(self, status: int, word: str, why: str) -> None:
        """`word` is the value of `error` in the response body; without one the body is empty."""
        super().__init__(why)
        self.status, self.word, self.why = status, word, why


def check_head(verb: str, path: bytes, query: bytes, headers: Headers, limits: dict[bytes, int]) -> int:
    """Check the header of a call; return the length of its body in bytes, or raise RefusedError.

    The raw path is compared, so an encoded path cannot pass as another one.
    """
    if len(headers.raw) > HEAD_LINES or _head_bytes(path, query, headers) > HEAD_BYTES:
        raise RefusedError(431, "head-too-large", "the request header is too large")
    if verb != "POST" or path not in limits or query:
        raise RefusedError(404, "", "this call is not allowed")
    if "transfer-encoding" in headers:
        raise RefusedError(411, "no-length", "the request has no content length")
    length = int(headers.get("content-length", "0"))
    if length > limits[path]:
        raise RefusedError(413, "too-large", f"the body of {length} bytes exceeds the limit of {limits[path]}")
    return length


def _head_bytes(path: bytes, query: bytes, headers: Headers) -> int:
    return len(path) + len(query) + sum(len(name) + len(value) for name, value in headers.raw)


def check_signature(headers: Headers, roster: Roster, now: datetime) -> RegisteredClient:
    """Return the registered client whose key signed the timestamp of a request; RefusedError (401) if there is none.

    `now` must have a time zone. The signature is verified with the registered key; nothing that a caller sends is
    parsed as a key.
    """
    values = [headers.getlist(name) for name in (KEY_HEADER, TIMESTAMP_HEADER, SIGNATURE_HEADER)]
    (key, *_), (timestamp, *_), (signature, *_) = (present or [""] for present in values)
    client = roster.find(_decoded(key))
    if client is None:
        raise RefusedError(401, "unknown-key", "no registered client has this key")
    if client.expired(now.astimezone(UTC).date()):
        raise RefusedError(401, "expired-key", f"the key of {client.name} expired on {client.until}")
    if any(len(present) != 1 for present in values) or not _signed(client.key, timestamp, _decoded(signature)):
        raise RefusedError(401, "bad-signature", f"the signature is not valid for the key of {client.name}")
    try:
        age = (now - datetime.fromisoformat(timestamp)).total_seconds()
    except (ValueError, TypeError, OverflowError) as error:
        raise RefusedError(
            401, "bad-signature", f"{client.name} signed a timestamp that is not a time with a zone"
        ) from error
    if not MIN_AGE_S < age < MAX_AGE_S:
        raise RefusedError(
            401, "clock", f"signed by {client.name} {age:.0f} s ago: its clock or this server's clock is wrong"
        )
    return client


def _decoded(text: str) -> bytes:
    try:
        return b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return b""


def _signed(key: ec.EllipticCurvePublicKey, text: str, signature: bytes) -> bool:
    try:
        key.verify(signature, text.encode("latin-1"), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


class Budget:
    """Limits the total size of bodies in transit, by their content lengths."""

    def __init__(self, total: int = TOTAL_BYTES, per_key: int = KEY_BYTES) -> None:
        """Allow `total` bytes in total and `per_key` bytes per client."""
        self.total, self.per_key = total, min(per_key, total)
        self._reserved: dict[str, int] = {}

    @contextmanager
    def reserved(self, name: str, size: int) -> Iterator[None]:
        """Reserve `size` bytes for a client; RefusedError (503) if its share or the total is exhausted."""
        reserved, total_reserved = self._reserved.get(name, 0), sum(self._reserved.values())
        if reserved + size > self.per_key:
            raise RefusedError(
                503, "busy", f"{name} has {reserved} bytes in transit; the limit is {self.per_key} per key"
            )
        if total_reserved + size > self.total:
            raise RefusedError(
                503, "busy", f"{total_reserved} bytes of all clients are in transit; the limit is {self.total}"
            )
        self._reserved[name] = reserved + size
        try:
            yield
        finally:
            self._reserved[name] -= size
            if not self._reserved[name]:
                del self._reserved[name]


class RateLimitedLog:
    """Logs messages about callers, limited per source so that no caller can fill the disk with them."""

    def __init__(self, log: logging.Logger) -> None:
        """Write to `log`."""
        self._log = log
        self._counts: dict[str, tuple[float, int]] = {}

    def warning(self, source: str, text: str) -> None:
        """Log a warning about `source` (a client's name or "strangers"), up to MAX_LINES per LINES_WINDOW_S seconds."""
        now = time.monotonic()
        since, count = self._counts.get(source, (now, 0))
        if now - since >= LINES_WINDOW_S:
            since, count = now, 0
        self._counts[source] = since, count + 1
        if count < MAX_LINES:
            self._log.warning("%s", text)
        elif count == MAX_LINES:
            self._log.warning(
                "further messages about %s are suppressed for %.0f s", source, LINES_WINDOW_S - (now - since)
            )
