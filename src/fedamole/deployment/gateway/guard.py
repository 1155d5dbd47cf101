"""Who may call through the gateway and how much, decided from a request's head before its body is asked for."""

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
"""The calls of Flower's Fleet API that are let through, each with the largest body in bytes.

Not let through are register-node and unregister-node, with which nodes without a registered key join, and get-run and
get-fab, with which a node fetches an app to run. push-messages is read whole and parsed: 1 MiB is a reply of 60 GiB in
pieces of 5 MiB, and bounds what parsing can cost.
"""

HEAD_BYTES, HEAD_LINES = 8 * KIB, 64
"""Largest head of a request: bytes of its headers and target, and number of headers. A client's has about 1 KiB."""

KEY_BYTES, TOTAL_BYTES = 48 * MIB, 256 * MIB
"""Bytes of bodies that are on their way to the SuperLink at once: of one key, and in all."""

KEY_HEADER, TIMESTAMP_HEADER, SIGNATURE_HEADER = "flwr-public-key", "flwr-timestamp", "flwr-signature"
"""The headers of a node's signature. They and the window repeat Flower's constants; a test compares them."""

MAX_AGE_S, MIN_AGE_S = 305, -5
"""The age in seconds that a signed timestamp may have; a negative age is a clock that is ahead. Both are excluded."""

MAX_LINES, LINES_WINDOW_S = 30, 10.0
"""Most log lines about one source in so many seconds."""


class RefusedError(Exception):
    """A call that is not let through: the status of the answer, the word of its JSON body, the reason for the log."""

    def __init__(self, status: int, word: str, why: str) -> None:
        """`word` is the value of `error` in the answer's body; with an empty one the body is empty."""
        super().__init__(why)
        self.status, self.word, self.why = status, word, why


def check_head(verb: str, path: bytes, query: bytes, headers: Headers, limits: dict[bytes, int]) -> int:
    """The length of the body in bytes, of a call that may pass if its signature is right; RefusedError otherwise.

    The raw path is compared, so no encoding can disguise another one.
    """
    if len(headers.raw) > HEAD_LINES or _head_bytes(path, query, headers) > HEAD_BYTES:
        raise RefusedError(431, "head-too-large", "the head of the request is too large")
    if verb != "POST" or path not in limits or query:
        raise RefusedError(404, "", "not a call that is let through")
    if "transfer-encoding" in headers:
        raise RefusedError(411, "no-length", "the body has no stated length")
    length = int(headers.get("content-length", "0"))
    if length > limits[path]:
        raise RefusedError(413, "too-large", f"the body of {length} bytes is larger than {limits[path]}")
    return length


def _head_bytes(path: bytes, query: bytes, headers: Headers) -> int:
    return len(path) + len(query) + sum(len(name) + len(value) for name, value in headers.raw)


def check_signature(headers: Headers, roster: Roster, now: datetime) -> RegisteredClient:
    """The registered client whose key has signed the head's timestamp; RefusedError (401) otherwise.

    `now` is the time with its zone. The key that verifies is the roster's own; nothing that a stranger sends is parsed
    as a key.
    """
    values = [headers.getlist(name) for name in (KEY_HEADER, TIMESTAMP_HEADER, SIGNATURE_HEADER)]
    (key, *_), (timestamp, *_), (signature, *_) = (found or [""] for found in values)
    client = roster.find(_decoded(key))
    if client is None:
        raise RefusedError(401, "unknown-key", "no registered client has this key")
    if client.expired(now.astimezone(UTC).date()):
        raise RefusedError(401, "expired-key", f"the key of {client.name} is past its last day, {client.until}")
    if any(len(found) != 1 for found in values) or not _signed(client.key, timestamp, _decoded(signature)):
        raise RefusedError(401, "bad-signature", f"not signed with the key of {client.name}")
    try:
        age = (now - datetime.fromisoformat(timestamp)).total_seconds()
    except (ValueError, TypeError, OverflowError) as error:
        raise RefusedError(401, "bad-signature", f"{client.name} has signed what is no time with a zone") from error
    if not MIN_AGE_S < age < MAX_AGE_S:
        raise RefusedError(401, "clock", f"signed by {client.name} {age:.0f} s ago: its clock, or this one, is wrong")
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
    """Bounds the bytes of bodies that are on their way at once, by their stated lengths."""

    def __init__(self, total: int = TOTAL_BYTES, per_key: int = KEY_BYTES) -> None:
        """Allow `total` bytes in all and `per_key` of each client."""
        self.total, self.per_key = total, min(per_key, total)
        self._reserved: dict[str, int] = {}

    @contextmanager
    def reserved(self, name: str, size: int) -> Iterator[None]:
        """Hold `size` bytes for a client; RefusedError (503) where its share or the whole is used up."""
        held, in_all = self._reserved.get(name, 0), sum(self._reserved.values())
        if held + size > self.per_key:
            raise RefusedError(503, "busy", f"{name} has {held} bytes on their way; at most {self.per_key} per key")
        if in_all + size > self.total:
            raise RefusedError(503, "busy", f"{in_all} bytes of all clients are on their way; at most {self.total}")
        self._reserved[name] = held + size
        try:
            yield
        finally:
            self._reserved[name] -= size
            if not self._reserved[name]:
                del self._reserved[name]


class RateLimitedLog:
    """Writes lines about callers to a log, so few that no caller can fill the disk with them."""

    def __init__(self, log: logging.Logger) -> None:
        """Write to `log`."""
        self._log = log
        self._counts: dict[str, tuple[float, int]] = {}

    def warning(self, source: str, text: str) -> None:
        """Write a warning about `source`, a client's name or "strangers"; leave it out after `MAX_LINES` in `LINES_WINDOW_S`."""
        now = time.monotonic()
        since, count = self._counts.get(source, (now, 0))
        if now - since >= LINES_WINDOW_S:
            since, count = now, 0
        self._counts[source] = since, count + 1
        if count < MAX_LINES:
            self._log.warning("%s", text)
        elif count == MAX_LINES:
            self._log.warning("further lines about %s are left out for %.0f s", source, LINES_WINDOW_S - (now - since))
