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

PER_ADDRESS = 16
"""Connections of one address (IPv6: of one /56 network) that have not yet made a signed call."""

STRANGERS, NEIGHBOURS = 128, 64
"""Such connections in all: of unknown addresses, and of addresses from which registered clients have called."""

REGISTERED = 256
"""Connections of registered clients in all."""

LEAST_PER_KEY, MOST_PER_KEY = 2, 8
"""Connections of one key: its share of `REGISTERED`, but within these bounds. A client uses up to five."""

STRANGER_S = 15.0
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
class Place:
    """What one connection holds: a stranger's place at first, a registered client's from its first signed call on."""

    network: str
    close: Callable[[], None] = lambda: None
    """Ends the connection at once."""
    name: str = ""
    """The registered client, once it is known."""
    deadline: asyncio.TimerHandle | None = None


@dataclass
class Waiting:
    """The places of connections that have not yet made a signed call, by network, the oldest first."""

    most: int
    per_network: int
    places: dict[str, list[Place]] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of connections."""
        return sum(map(len, self.places.values()))

    def full(self, network: str) -> Place | None:
        """The connection that has to make room for another one of a network, if there is none left.

        It is the oldest of the same network, or the oldest of the network that has the most.
        """
        own = self.places.get(network, [])
        if len(own) >= self.per_network:
            return own[0]
        return max(self.places.values(), key=len)[0] if len(self) >= self.most else None

    def add(self, place: Place) -> None:
        """Note a new connection."""
        self.places.setdefault(place.network, []).append(place)

    def discard(self, place: Place) -> None:
        """Forget a connection, if it is among these."""
        own = self.places.get(place.network, [])
        if place in own:
            own.remove(place)
            if not own:
                del self.places[place.network]


class Places:
    """All connections of the gateway. Its methods are called within the event loop."""

    def __init__(self, stranger_s: float = STRANGER_S) -> None:
        """`stranger_s` is the time to a connection's first signed call, see `STRANGER_S`."""
        self.stranger_s = stranger_s
        self._strangers = Waiting(STRANGERS, PER_ADDRESS)
        self._neighbours = Waiting(NEIGHBOURS, PER_ADDRESS)
        self._registered: dict[str, set[Place]] = {}
        self._known: dict[str, deque[str]] = {}

    def enter(self, address: str) -> Place:
        """A stranger's place for a new connection; an older stranger may be closed for it."""
        place = Place(network_of(address))
        near = any(place.network in networks for networks in self._known.values())
        waiting = self._neighbours if near else self._strangers
        if (oldest := waiting.full(place.network)) is not None:
            self._end(oldest)
        waiting.add(place)
        place.deadline = asyncio.get_running_loop().call_later(self.stranger_s, self._end, place)
        return place

    def admit(self, place: Place, name: str, keys: int) -> None:
        """Make a place that of the registered client `name`, of `keys` in the roster.

        Raises RefusedError (503) where the client, or all together, have as many connections as they may have.
        """
        if place.name == name:
            return
        own = self._registered.get(name, set())
        most = max(LEAST_PER_KEY, min(MOST_PER_KEY, REGISTERED // max(keys, 1)))
        if len(own) >= most:
            raise RefusedError(503, "busy", f"{name} has {len(own)} connections; at most {most} per key")
        if sum(map(len, self._registered.values())) >= REGISTERED:
            raise RefusedError(503, "busy", f"registered clients have {REGISTERED} connections, the most there are")
        self.leave(place)
        place.name = name
        self._registered.setdefault(name, set()).add(place)
        known = self._known.setdefault(name, deque(maxlen=ADDRESSES))
        if place.network in known:
            known.remove(place.network)
        known.append(place.network)

    def leave(self, place: Place) -> None:
        """Give a place back; once more does nothing."""
        if place.deadline is not None:
            place.deadline.cancel()
        self._strangers.discard(place)
        self._neighbours.discard(place)
        own = self._registered.get(place.name, set())
        own.discard(place)
        if place.name in self._registered and not own:
            del self._registered[place.name]

    def _end(self, place: Place) -> None:
        self.leave(place)
        place.close()
