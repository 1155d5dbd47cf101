"""Signed orders: what a coordinator asks of one client, for one time.

An order is a request (`engine.wire.Request`, packed) with a signed head before it. The signature is made with the
coordinator's key (`coordinator.key` of its certificates) and checked with `coordinator.pub`, which every client has
beside `ca.crt`. Whoever else can put a message into a client's queue, such as another client, Flower's database or
the gateway, cannot give an order: a client drops what is not signed for it. The head names the client and holds a
counter that only grows, so that a client takes each order once; run, round, operation and exchange stand in the
request, whose hash is signed.

Layout, in bytes: MAGIC, length of the signature (2), signature, length of the head (2), head (JSON), request.
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
    from fedamole.engine.remote import Link

MAGIC = b"fedamole-order-1\n"
SIGNATURE = ec.ECDSA(hashes.SHA384())
MAX_AHEAD_NS = 24 * 3600 * 10**9
"""Nanoseconds that a counter, which comes from the coordinator's clock, may lie ahead of this machine's clock."""
MAX_HEAD_BYTES = 4096
"""Bytes of a head; a longer one is no order."""


class OrderError(FedamoleError):
    """Bytes that are no order of this coordinator for this client, or an order that was taken before."""


@dataclass(frozen=True)
class Order:
    """An order whose signature, addressee and hash are right."""

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
    """Check an order and take it apart; OrderError says what is wrong with it.

    `key` is the coordinator's; None accepts an empty signature, which only a client with --insecure does. The
    signature is checked before anything that it covers is read.
    """
    head_at, signature = _read_part(order, len(MAGIC))
    request_at, head = _read_part(order, head_at)
    if not order.startswith(MAGIC) or not 0 < len(head) <= MAX_HEAD_BYTES:
        raise OrderError("it is no signed order: use one version of fedamole everywhere")
    if key is not None:
        try:
            key.verify(signature, MAGIC + head, SIGNATURE)
        except InvalidSignature:
            raise OrderError("its signature is not that of the coordinator whose coordinator.pub is here") from None
    try:
        told = json.loads(head)
        named, counter, digest = told["client"], told["counter"], told["sha256"]
    except (ValueError, KeyError, TypeError):
        raise OrderError("its head is damaged") from None
    request = order[request_at:]
    if type(counter) is not int or counter < 0 or hashlib.sha256(request).hexdigest() != digest:
        raise OrderError("its content is not what was signed")
    if key is not None and named != client:
        raise OrderError("it is signed for another client")
    return Order(counter, request)


def _read_part(order: bytes, at: int) -> tuple[int, bytes]:
    """Return where the next part begins, and a part with its length in two bytes before it."""
    begin = at + 2
    end = begin + int.from_bytes(order[at:begin], "big")
    return end, order[begin:end]


class OrderCounter:
    """The highest counter that a client has taken from a coordinator's key, kept in a file."""

    def __init__(self, path: Path, key: str, clock: Callable[[], int] = time.time_ns) -> None:
        """Read the file where it exists; OrderError where it is damaged. `key` names the coordinator's key.

        Counters of another key do not count: so a coordinator whose key was stolen can begin anew with another one.
        """
        self.path, self.key, self.clock, self.counter = path, key, clock, -1
        if path.exists():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                self.counter = int(found["counter"]) if found["key"] == key else -1
            except (ValueError, KeyError, TypeError, OSError) as error:
                raise OrderError(
                    f"{path} is damaged, and without it an old order could be taken again; remove it if you are sure "
                    "that nobody has put it there"
                ) from error

    def accept(self, order: Order) -> None:
        """Note an order before it is carried out; OrderError where it, or a later one, was taken before."""
        if order.counter <= self.counter:
            raise OrderError("it was taken before, or is older than one that was")
        if order.counter > self.clock() + MAX_AHEAD_NS:
            raise OrderError("it is of more than a day in the future: one of the two clocks is wrong")
        write_atomic(self.path, json.dumps({"key": self.key, "counter": order.counter}))
        self.counter = order.counter


class SignedLink:
    """A link whose messages are orders: each is signed for the client that its node is registered as."""

    def __init__(
        self, link: "Link", key: ec.EllipticCurvePrivateKey | None, clock: Callable[[], int] = time.time_ns
    ) -> None:
        """Sign with a coordinator's key; None (--insecure) leaves signatures empty."""
        self.link, self.key, self.clock = link, key, clock
        self._names: Mapping[int, str] = {}
        self._counter = 0

    def nodes(self) -> Mapping[int, str]:
        """Nodes that are online, with the name each is registered by."""
        self._names = self.link.nodes()
        return self._names

    def send(self, node: int, payload: bytes, round_: int, seconds: float) -> str:
        """Sign and send bytes to a node; return a ticket for the answer.

        Counters come from the clock, so that they grow from one process of the coordinator to the next.
        """
        self._counter = max(self._counter + 1, self.clock())
        order = sign_order(self.key, self._names.get(node, ""), self._counter, payload)
        return self.link.send(node, order, round_, seconds)

    def receive(self, tickets: Collection[str]) -> Mapping[str, bytes | str]:
        """What has come of these tickets."""
        return self.link.receive(tickets)
