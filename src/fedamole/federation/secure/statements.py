"""What clients and server state to each other in one exchange of secure aggregation, and how clients sign it.

Every signature covers the kind of statement, the run, the round and the exchange, so that it is worth nothing in any
other. Clients sign with their deployment key (ECDSA on P-384 with SHA-384) and check each other by keys that they were
given beforehand, never by keys that the server names.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384

from fedamole.errors import FedamoleError

Roster = Mapping[str, ec.EllipticCurvePublicKey]
"""Verifying keys of all clients by name, as provisioned."""


class SecureAggregationError(FedamoleError):
    """A client refuses to continue, because something it was shown would reveal an update or is not genuine."""


class Context(NamedTuple):
    """One exchange of one run."""

    run: str
    round: int
    exchange: int


def canonical(kind: str, *parts: Any) -> bytes:
    """Return the bytes of a statement: the same for equal parts, and different for a different kind or parts."""
    return json.dumps(["fedamole secure aggregation 1", kind, *parts], sort_keys=True, separators=(",", ":")).encode()


@dataclass(frozen=True)
class Advertisement:
    """A client's public key for one exchange."""

    name: str
    public: bytes
    """X25519 public key, made for this exchange alone (32 bytes)."""
    signature: bytes


@dataclass(frozen=True)
class Group:
    """The clients whose values of a tensor are summed."""

    holders: tuple[str, ...]
    """Names in sorted order."""
    relative: bool
    """Whether clients send the change of what they were sent, not the value."""


@dataclass(frozen=True)
class Announcement:
    """What the server says will be summed; all clients of an exchange must see the same."""

    context: Context
    advertisements: Mapping[str, Advertisement]
    groups: Mapping[str, Group]
    """By key of a tensor in a reply."""

    def hash(self) -> str:
        """Return the SHA-256 of all of it, as hexadecimal digits."""
        keys = {name: [it.name, it.public.hex()] for name, it in self.advertisements.items()}
        groups = {key: [list(group.holders), group.relative] for key, group in self.groups.items()}
        return hashlib.sha256(canonical("announcement", [*self.context], keys, groups)).hexdigest()

    def opened(self, survivors: frozenset[str], min_group: int) -> list[str]:
        """Return the keys whose sums may be read: at least `min_group` of their holders sent a masked value."""
        return [
            key
            for key, group in sorted(self.groups.items())
            if sum(name in survivors for name in group.holders) >= min_group
        ]


def advertisement_bytes(context: Context, name: str, public: bytes) -> bytes:
    """Return what a client signs to advertise a public key."""
    return canonical("key", [*context], name, public.hex())


def survivors_bytes(context: Context, announced: str, survivors: frozenset[str]) -> bytes:
    """Return what a client signs to confirm the survivors' list; `announced` is the hash of the announcement."""
    return canonical("survivors", [*context], announced, sorted(survivors))


def sign(key: ec.EllipticCurvePrivateKey, content: bytes) -> bytes:
    """Return a signature of a statement."""
    return key.sign(content, ec.ECDSA(SHA384()))


def check_signature(roster: Roster, name: str, content: bytes, signature: bytes, what: str) -> None:
    """Raise SecureAggregationError unless a client signed a statement; `what` names it in the error."""
    if name not in roster:
        raise SecureAggregationError(f"{what}: client {name!r} is not on this client's roster")
    try:
        roster[name].verify(signature, content, ec.ECDSA(SHA384()))
    except InvalidSignature as error:
        raise SecureAggregationError(
            f"{what}: client {name!r} did not sign this; the server shows different things to different clients, or "
            "repeats an old message"
        ) from error
