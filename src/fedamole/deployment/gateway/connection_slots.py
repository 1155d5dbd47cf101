"""Limits on connections: few and short-lived ones before authentication, separate ones for registered clients.

A connection is unauthenticated until its first call that is signed by a registered key. Unauthenticated connections are
limited per address and in total; if no slot is free, an older one is closed, so nobody can be locked out by idle
connections. Addresses from which registered clients have called have separate slots.
"""

import asyncio
import ipaddress
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from fedamole.deployment.gateway.guard import RefusedError

MAX_PER_ADDRESS = 16
"""Maximum unauthenticated connections per address (IPv6: per /56 network)."""

MAX_UNKNOWN, MAX_KNOWN_ADDRESSES = 128, 64
"""Maximum unauthenticated connections in total: from unknown addresses, and from addresses of registered clients."""

MAX_REGISTERED = 256
"""Maximum authenticated connections in total."""

MIN_PER_KEY, MAX_PER_KEY = 2, 8
"""Connections per key: an equal share of `MAX_REGISTERED` within these bounds. A client uses up to five."""

FIRST_CALL_S = 15.0
"""Seconds until a connection must make its first signed call, including the TLS handshake."""

ADDRESSES = 4
"""Number of recent addresses that are remembered per key."""


def network_of(address: str) -> str:
    """Return the unit that counts as one address: an IPv4 address, or the /56 network of an IPv6 address."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    return str(parsed.ipv4_mapped or ipaddress.ip_network((parsed, 56), strict=False))


@dataclass(eq=False)
class ConnectionSlot:
    """One connection's slot: unauthenticated at first, a registered client's from its first signed call on."""

    network: str
    close: Callable[[], None] = lambda: None
    """Closes the connection immediately."""
    name: str = ""
    """Name of the registered client; empty before authentication."""
    deadline: asyncio.TimerHandle | None = None


@dataclass
class UnauthenticatedSlots:
    """Slots of unauthenticated connections by network, oldest first."""

    most: int
    per_network: int
    slots: dict[str, list[ConnectionSlot]] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of connections."""
        return sum(map(len, self.slots.values()))

    def to_close(self, network: str) -> ConnectionSlot | None:
        """Return the connection to close for a new one of `network`; None while a slot is free.

        It is the oldest of the same network, or the oldest of the network with the most connections.
        """
        same_network = self.slots.get(network, [])
        if len(same_network) >= self.per_network:
            return same_network[0]
        return max(self.slots.values(), key=len)[0] if len(self) >= self.most else None

    def add(self, slot: ConnectionSlot) -> None:
        """Add a connection."""
        self.slots.setdefault(slot.network, []).append(slot)

    def discard(self, slot: ConnectionSlot) -> None:
        """Remove a connection if present."""
        same_network = self.slots.get(slot.network, [])
        if slot in same_network:
            same_network.remove(slot)
            if not same_network:
                del self.slots[slot.network]


class ConnectionSlots:
    """All connections of the gateway. Call its methods from the event loop only."""

    def __init__(self, first_call_s: float = FIRST_CALL_S) -> None:
        """`first_call_s` is the time to a connection's first signed call, see `FIRST_CALL_S`."""
        self.first_call_s = first_call_s
        self._unknown = UnauthenticatedSlots(MAX_UNKNOWN, MAX_PER_ADDRESS)
        self._known_addresses = UnauthenticatedSlots(MAX_KNOWN_ADDRESSES, MAX_PER_ADDRESS)
        self._registered: dict[str, set[ConnectionSlot]] = {}
        self._addresses: dict[str, deque[str]] = {}

    def acquire(self, address: str) -> ConnectionSlot:
        """Return an unauthenticated slot for a new connection; an older connection may be closed for it."""
        slot = ConnectionSlot(network_of(address))
        is_known = any(slot.network in networks for networks in self._addresses.values())
        pool = self._known_addresses if is_known else self._unknown
        if (oldest := pool.to_close(slot.network)) is not None:
            self._end(oldest)
        pool.add(slot)
        slot.deadline = asyncio.get_running_loop().call_later(self.first_call_s, self._end, slot)
        return slot

    def authenticate(self, slot: ConnectionSlot, name: str, keys: int) -> None:
        """Assign a slot to the registered client `name`; `keys` is the number of registered keys.

        Raises RefusedError (503) if the client, or all clients together, have reached their limit.
        """
        if slot.name == name:
            return
        client_slots = self._registered.get(name, set())
        limit = max(MIN_PER_KEY, min(MAX_PER_KEY, MAX_REGISTERED // max(keys, 1)))
        if len(client_slots) >= limit:
            raise RefusedError(503, "busy", f"{name} has {len(client_slots)} connections; the limit is {limit} per key")
        if sum(map(len, self._registered.values())) >= MAX_REGISTERED:
            raise RefusedError(503, "busy", f"registered clients have {MAX_REGISTERED} connections, which is the limit")
        self.release(slot)
        slot.name = name
        self._registered.setdefault(name, set()).add(slot)
        addresses = self._addresses.setdefault(name, deque(maxlen=ADDRESSES))
        if slot.network in addresses:
            addresses.remove(slot.network)
        addresses.append(slot.network)

    def release(self, slot: ConnectionSlot) -> None:
        """Release a slot; releasing it again has no effect."""
        if slot.deadline is not None:
            slot.deadline.cancel()
        self._unknown.discard(slot)
        self._known_addresses.discard(slot)
        client_slots = self._registered.get(slot.name, set())
        client_slots.discard(slot)
        if slot.name in self._registered and not client_slots:
            del self._registered[slot.name]

    def _end(self, slot: ConnectionSlot) -> None:
        self.release(slot)
        slot.close()
