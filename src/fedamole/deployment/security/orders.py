"""Signed orders: requests of the coordinator that one client accepts once.

An order is a request (`engine.messages.Request`, packed) with a signed header. The signature is made with the
coordinator's key (`coordinator.key` of its certificates) and checked with `coordinator.pub`, which every client has
next to `ca.crt`. Anyone else who can put a message into a client's queue, such as another client, Flower's database or
the gateway, cannot issue an order: a client drops messages that are not signed for it. The header names the client and
holds a counter that only grows, so a client accepts each order once. Run, round, operation and exchange are in the
request, whose hash is signed.

Layout, in bytes: MAGIC, length of the signature (2), signature, length of the header (2), header (JSON), request.
"""

import hashlib
import json
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedamole.errors import FedamoleError
from fedamole.files import write_atomic

if TYPE_CHECKING:
    from fedamole.engine.link import Link

MAGIC = b"fedamole-order-1\n"
SIGNATURE = ec.ECDSA(hashes.SHA384())
MAX_AHEAD_NS = 24 * 3600 * 10**9
"""Nanoseconds that a counter, which comes from the coordinator's clock, may be ahead of this machine's clock."""
MAX_HEAD_BYTES = 4096
"""Maximum size in bytes of a header."""


class OrderError(FedamoleError):
    """Bytes that are not an order of this coordinator for this client, or an order that was accepted before."""


@dataclass(frozen=True)
class Order:
    """An order with a valid signature, recipient and hash."""

    counter: int
    request: bytes


def sign_order(key: ec.EllipticCurvePrivateKey | None, client: str, counter: int, request: bytes) -> bytes:
    """Return the bytes of an order; without a key (--insecure, on loopback) its signature is empty."""
    head = json.dumps(
        {"client": client, "counter": counter, "sha256": hashlib.sha256(request).hexdigest()}, sort_keys=True
    ).encode()
    signature = b"" if key is None else key.sign(MAGIC + head, SIGNATURE)
    return b"".join((MAGIC, len(signature).to_bytes(2, "big"), signature, len(head).to_bytes(2, "big"), head, request))


def open_order(key: ec.EllipticCurvePublicKey | None, client: str, order: bytes) -> Order:
    """Check and parse an order; OrderError states what is wrong with it.

    `key` is the coordinator's; with None, which only --insecure uses, an empty signature is accepted. The signature is
    checked before any of the signed content is parsed.
    """
    head_at, signature = _read_part(order, len(MAGIC))
    request_at, head = _read_part(order, head_at)
    if not order.startswith(MAGIC) or not 0 < len(head) <= MAX_HEAD_BYTES:
        raise OrderError("it is not a signed order: use the same version of fedamole everywhere")
    if key is not None:
        try:
            key.verify(signature, MAGIC + head, SIGNATURE)
        except InvalidSignature:
            raise OrderError("its signature does not match the coordinator.pub of this client") from None
    try:
        fields = json.loads(head)
        recipient, counter, digest = fields["client"], fields["counter"], fields["sha256"]
    except (ValueError, KeyError, TypeError):
        raise OrderError("its header is damaged") from None
    request = order[request_at:]
    if type(counter) is not int or counter < 0 or hashlib.sha256(request).hexdigest() != digest:
        raise OrderError("its content does not match the signed hash")
    if key is not None and recipient != client:
        raise OrderError("it is signed for another client")
    return Order(counter, request)


def _read_part(order: bytes, at: int) -> tuple[int, bytes]:
    """Return the offset after a part and the part, which is preceded by its length in two bytes."""
    begin = at + 2
    end = begin + int.from_bytes(order[at:begin], "big")
    return end, order[begin:end]


class OrderCounter:
    """The highest counter that a client has accepted from a coordinator's key, stored in a file."""

    def __init__(self, path: Path, key: str, clock: Callable[[], int] = time.time_ns) -> None:
        """Read the file if it exists; OrderError if it is damaged. `key` identifies the coordinator's key.

        Counters of other keys are ignored, so a coordinator whose key was stolen can start over with a new one.
        """
        self.path, self.key, self.clock, self.counter = path, key, clock, -1
        if path.exists():
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))
                self.counter = int(stored["counter"]) if stored["key"] == key else -1
            except (ValueError, KeyError, TypeError, OSError) as error:
                raise OrderError(
                    f"{path} is damaged, so old orders could be accepted again; remove it only if you are sure "
                    "that nobody has tampered with it"
                ) from error

    def accept(self, order: Order) -> None:
        """Record an order before it is carried out; OrderError if it, or a later one, was accepted before."""
        if order.counter <= self.counter:
            raise OrderError("it was accepted before, or is older than one that was")
        if order.counter > self.clock() + MAX_AHEAD_NS:
            raise OrderError("it is dated more than a day in the future: one of the two clocks is wrong")
        write_atomic(self.path, json.dumps({"key": self.key, "counter": order.counter}))
        self.counter = order.counter


class SignedLink:
    """A link that sends every message as an order, signed for the client that its node is registered as."""

    def __init__(
        self, link: "Link", key: ec.EllipticCurvePrivateKey | None, clock: Callable[[], int] = time.time_ns
    ) -> None:
        """Sign with the coordinator's key; with None (--insecure) signatures are empty."""
        self.link, self.key, self.clock = link, key, clock
        self._names: Mapping[int, str] = {}
        self._counter = 0

    def nodes(self) -> Mapping[int, str]:
        """Return the nodes that are online, with their registered names."""
        self._names = self.link.nodes()
        return self._names

    def send(self, node: int, payload: bytes, round_: int, seconds: float) -> str:
        """Sign and send bytes to a node; return a ticket for the answer.

        Counters come from the clock, so they also grow across restarts of the coordinator.
        """
        self._counter = max(self._counter + 1, self.clock())
        order = sign_order(self.key, self._names.get(node, ""), self._counter, payload)
        return self.link.send(node, order, round_, seconds)

    def receive(self, tickets: Collection[str]) -> Mapping[str, bytes | str]:
        """Return the answers that have arrived for these tickets."""
        return self.link.receive(tickets)
