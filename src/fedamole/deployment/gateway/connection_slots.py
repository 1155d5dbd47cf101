"""Places for connections: strangers have few and for a short time, registered clients have their own.

A connection is a stranger's until it makes a call that a registered key has signed. Strangers' places are bounded by
address and in all; where they are full, an older stranger is closed for the new one, so that holding places keeps
nobody out. Addresses from which registered clients have called have waiting places apart from everybody else's.
"""

import asyncio
import ipaddress
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from fedamole.deployment.gateway.guard import RefusedError

MAX_PER_ADDRESS = 16
"""Connections of one address (IPv6: of one /56 network) that have not yet made a signed call."""

MAX_UNKNOWN, MAX_KNOWN_ADDRESSES = 128, 64
"""Such connections in all: of unknown addresses, and of addresses from which registered clients have called."""

MAX_REGISTERED = 256
"""Connections of registered clients in all."""

MIN_PER_KEY, MAX_PER_KEY = 2, 8
"""Connections of one key: its share of `MAX_REGISTERED`, but within these bounds. A client uses up to five."""

FIRST_CALL_S = 15.0
"""Seconds in which a connection has to make its first signed call; its TLS handshake is part of that."""

ADDRESSES = 4
"""Addresses that are remembered of each key, the latest ones."""


def network_of(address: str) -> str:
    """What counts as one address: an IPv4 address, or the /56 network of an IPv6 address."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    return str(found.ipv4_mapped or ipaddress.ip_network((found, 56), strict=False))


@dataclass(eq=False)
class ConnectionSlot:
    """What one connection holds: a stranger's place at first, a registered client's from its first signed call on."""

    network: str
    close: Callable[[], None] = lambda: None
    """Ends the connection at once."""
    name: str = ""
    """The registered client, once it is known."""
    deadline: asyncio.TimerHandle | None = None


@dataclass
class UnauthenticatedSlots:
    """The places of connections that have not yet made a signed call, by network, the oldest first."""

    most: int
    per_network: int
    slots: dict[str, list[ConnectionSlot]] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of connections."""
        return sum(map(len, self.slots.values()))

    def full(self, network: str) -> ConnectionSlot | None:
        """The connection that has to make room for another one of a network, if there is none left.

        It is the oldest of the same network, or the oldest of the network that has the most.
        """
        sock = self.slots.get(network, [])
        if len(sock) >= self.per_network:
            return sock[0]
        return max(self.slots.values(), key=len)[0] if len(self) >= self.most else None

    def add(self, slot: ConnectionSlot) -> None:
        """Note a new connection."""
        self.slots.setdefault(slot.network, []).append(slot)

    def discard(self, slot: ConnectionSlot) -> None:
        """Forget a connection, if it is among these."""
        sock = self.slots.get(slot.network, [])
        if slot in sock:
            sock.remove(slot)
            if not sock:
                del self.slots[slot.network]


class ConnectionSlots:
    """All connections of the gateway. Its methods are called within the event loop."""

    def __init__(self, first_call_s: float = FIRST_CALL_S) -> None:
        """`first_call_s` is the time to a connection's first signed call, see `FIRST_CALL_S`."""
        self.first_call_s = first_call_s
        self._unknown = UnauthenticatedSlots(MAX_UNKNOWN, MAX_PER_ADDRESS)
        self._known_addresses = UnauthenticatedSlots(MAX_KNOWN_ADDRESSES, MAX_PER_ADDRESS)
        self._registered: dict[str, set[ConnectionSlot]] = {}
        self._addresses: dict[str, deque[str]] = {}

    def acquire(self, address: str) -> ConnectionSlot:
        """A stranger's place for a new connection; an older stranger may be closed for it."""
        slot = ConnectionSlot(network_of(address))
        near = any(slot.network in networks for networks in self._addresses.values())
        waiting = self._known_addresses if near else self._unknown
        if (oldest := waiting.full(slot.network)) is not None:
            self._end(oldest)
        waiting.add(slot)
        slot.deadline = asyncio.get_running_loop().call_later(self.first_call_s, self._end, slot)
        return slot

    def authenticate(self, slot: ConnectionSlot, name: str, keys: int) -> None:
        """Make a place that of the registered client `name`, of `keys` in the roster.

        Raises RefusedError (503) where the client, or all together, have as many connections as they may have.
        """
        if slot.name == name:
            return
        sock = self._registered.get(name, set())
        most = max(MIN_PER_KEY, min(MAX_PER_KEY, MAX_REGISTERED // max(keys, 1)))
        if len(sock) >= most:
            raise RefusedError(503, "busy", f"{name} has {len(sock)} connections; at most {most} per key")
        if sum(map(len, self._registered.values())) >= MAX_REGISTERED:
            raise RefusedError(503, "busy", f"registered clients have {MAX_REGISTERED} connections, the most there are")
        self.release(slot)
        slot.name = name
        self._registered.setdefault(name, set()).add(slot)
        known = self._addresses.setdefault(name, deque(maxlen=ADDRESSES))
        if slot.network in known:
            known.remove(slot.network)
        known.append(slot.network)

    def release(self, slot: ConnectionSlot) -> None:
        """Give a place back; once more does nothing."""
        if slot.deadline is not None:
            slot.deadline.cancel()
        self._unknown.discard(slot)
        self._known_addresses.discard(slot)
        sock = self._registered.get(slot.name, set())
        sock.discard(slot)
        if slot.name in self._registered and not sock:
            del self._registered[slot.name]

    def _end(self, slot: ConnectionSlot) -> None:
        self.release(slot)
        slot.close()
