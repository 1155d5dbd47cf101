"""A client's side of one exchange of secure aggregation.

    1. advertise: a fresh X25519 key, signed with the deployment key.
    2. mask: check the announced groups, encode the values, add the client's own mask and all pair masks.
    3. confirm: sign the list of clients whose masked values arrived (the survivors), once per exchange.
    4. reveal: after checking that every survivor signed the same announcement and the same list, give away the seeds
       of the client's own masks and those of the pair masks with clients that are not on the list. Only seeds of
       tensors with at least `min_group` survivors leave.

No client is unmasked alone: of each client the others reveal pair masks only if it is not on the one list that all
signed, and it reveals its own masks only if it is. A key and a seed serve one exchange and are forgotten after it.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedamole.federation.secure.fixed_point import Words, encode
from fedamole.federation.secure.journal import Journal
from fedamole.federation.secure.masks import SEED_BYTES, add, pair_secret, seed_of, sign_of, stream
from fedamole.federation.secure.settings import MIN_GROUP
from fedamole.federation.secure.statements import (
    Advertisement,
    Announcement,
    Context,
    Roster,
    SecureAggregationError,
    advertisement_bytes,
    check_signature,
    sign,
    survivors_bytes,
)

Values = Mapping[str, npt.NDArray[np.float64]]
"""Values (n) of the tensors of a reply, by key."""


@dataclass(frozen=True)
class Revealed:
    """Seeds that a survivor gives away."""

    own: Mapping[str, bytes]
    """Seed of its own mask, by key."""
    pairs: Mapping[str, Mapping[str, bytes]]
    """Seed of its pair mask, by key and name of the client that is not a survivor."""


@dataclass
class _Exchange:
    """Secrets and progress of the exchange that a client is in."""

    context: Context
    private: X25519PrivateKey
    own_secret: bytes
    announcement: Announcement | None = None
    survivors: frozenset[str] | None = None


class Participant:
    """A client that takes part in secure aggregation."""

    def __init__(
        self,
        name: str,
        key: ec.EllipticCurvePrivateKey,
        roster: Roster,
        journal: Journal,
        *,
        run: str,
        min_group: int,
        clip: float,
    ) -> None:
        """Take part in a run under a name; `roster` holds the verifying keys of all clients, provisioned beforehand.

        Raises SecureAggregationError if `min_group` is too small to hide anything.
        """
        if min_group < MIN_GROUP:
            raise SecureAggregationError(f"groups of {min_group} clients hide nothing; at least {MIN_GROUP} are needed")
        self.name, self.key, self.roster, self.journal = name, key, roster, journal
        self.run, self.min_group, self.clip = run, min_group, clip
        self.clipped = 0
        """How many values were cut to -clip .. clip so far. The count stays at the client."""
        self._exchange: _Exchange | None = None

    def advertise(self, context: Context) -> Advertisement:
        """Begin an exchange with fresh secrets; an earlier one that is not finished ends without a sum.

        Raises SecureAggregationError if this client's update is in an opened sum of the same exchange.
        """
        if context.run != self.run:
            raise SecureAggregationError("the exchange belongs to another run")
        self.journal.check_open(context)
        self._exchange = _Exchange(context, X25519PrivateKey.generate(), os.urandom(SEED_BYTES))
        public = self._exchange.private.public_key().public_bytes_raw()
        return Advertisement(self.name, public, sign(self.key, advertisement_bytes(context, self.name, public)))

    def mask(self, announcement: Announcement, values: Values) -> dict[str, Words]:
        """Return the masked values of the announced tensors that this client holds, by key.

        Raises SecureAggregationError if the announcement is not one that this client accepts, or was given before.
        """
        exchange = self._current(announcement.context)
        if exchange.announcement is not None:
            raise SecureAggregationError(
                "values of this exchange were masked already; the same masks never serve twice"
            )
        own_keys = self._check_announcement(announcement, exchange, values)
        secrets = self._pair_secrets(exchange, announcement)
        exchange.announcement = announcement
        masked = {}
        for key in own_keys:
            encoded = encode(values[key], self.clip)
            self.clipped += encoded.clipped
            total = encoded.words
            add(total, stream(seed_of(exchange.own_secret, key), len(total)), 1)
            for other in announcement.groups[key].holders:
                if other != self.name:
                    add(total, stream(seed_of(secrets[other], key), len(total)), sign_of(self.name, other))
            masked[key] = total
        return masked

    def confirm(self, context: Context, survivors: frozenset[str]) -> bytes:
        """Sign a list of survivors.

        Raises SecureAggregationError without values that this client has masked, if the list lacks this client or
        names clients that were not announced, and if another list was confirmed before.
        """
        exchange = self._current(context)
        if exchange.announcement is None:
            raise SecureAggregationError("a list of survivors came before the values were masked")
        if exchange.survivors not in (None, survivors):
            raise SecureAggregationError("two different lists of survivors; one of them was confirmed already")
        if self.name not in survivors:
            raise SecureAggregationError("the list of survivors lacks this client")
        if unknown := survivors - set(exchange.announcement.advertisements):
            raise SecureAggregationError(f"the list of survivors names {min(unknown)!r}, who was not announced")
        exchange.survivors = survivors
        return sign(self.key, survivors_bytes(context, exchange.announcement.hash(), survivors))

    def reveal(self, context: Context, confirmations: Mapping[str, bytes]) -> Revealed:
        """Return the seeds that open the sums, given every survivor's signature of the list.

        The journal is written first. Raises SecureAggregationError if a survivor did not sign the same announcement
        and list as this client; then nothing of this exchange is ever revealed by this client.
        """
        exchange = self._current(context)
        announcement, survivors = exchange.announcement, exchange.survivors
        if announcement is None or survivors is None:
            raise SecureAggregationError("seeds were asked for before a list of survivors was confirmed")
        content = survivors_bytes(context, announcement.hash(), survivors)
        for name in sorted(survivors):
            if name not in confirmations:
                raise SecureAggregationError(f"survivors' list: the signature of {name!r} is missing")
            check_signature(self.roster, name, content, confirmations[name], "survivors' list")
        self.journal.check_open(context)
        self.journal.record(context)
        opened = [
            key
            for key in announcement.opened(survivors, self.min_group)
            if self.name in announcement.groups[key].holders
        ]
        secrets = self._pair_secrets(exchange, announcement)
        self._exchange = None
        return Revealed(
            {key: seed_of(exchange.own_secret, key) for key in opened},
            {
                key: {
                    other: seed_of(secrets[other], key)
                    for other in announcement.groups[key].holders
                    if other not in survivors
                }
                for key in opened
            },
        )

    def _current(self, context: Context) -> _Exchange:
        if self._exchange is None or self._exchange.context != context:
            raise SecureAggregationError(
                f"round {context.round}, exchange {context.exchange}: this client is not in that exchange; the message "
                "is an old one, or the client was restarted"
            )
        return self._exchange

    def _check_announcement(self, announcement: Announcement, exchange: _Exchange, values: Values) -> list[str]:
        """Return the keys that this client is to mask; SecureAggregationError if it does not accept the groups."""
        own = announcement.advertisements.get(self.name)
        if own is None or own.public != exchange.private.public_key().public_bytes_raw():
            raise SecureAggregationError("the announcement does not have this client's key of this exchange")
        for name, advertisement in announcement.advertisements.items():
            if advertisement.name != name:
                raise SecureAggregationError(f"the key of {name!r} was announced for another client")
            content = advertisement_bytes(announcement.context, name, advertisement.public)
            check_signature(self.roster, name, content, advertisement.signature, "public key")
        own_keys = []
        for key, group in announcement.groups.items():
            if list(group.holders) != sorted(set(group.holders)):
                raise SecureAggregationError(f"{key}: the holders are not in order, or one is named twice")
            if unknown := set(group.holders) - set(announcement.advertisements):
                raise SecureAggregationError(f"{key}: no public key of holder {min(unknown)!r} was announced")
            if len(group.holders) < self.min_group:
                raise SecureAggregationError(
                    f"{key}: a group of {len(group.holders)} clients, but this client accepts {self.min_group} or more"
                )
            if self.name in group.holders:
                own_keys.append(key)
        if missing := sorted(set(own_keys) - set(values)):
            raise SecureAggregationError(f"{missing[0]}: this client is named as a holder, but it has no such tensor")
        return sorted(own_keys)

    def _pair_secrets(self, exchange: _Exchange, announcement: Announcement) -> dict[str, bytes]:
        """Return the secret that this client shares with each other client, by name."""
        try:
            return {
                name: pair_secret(exchange.private, it.public, (self.name, name), exchange.context)
                for name, it in announcement.advertisements.items()
                if name != self.name
            }
        except ValueError as error:
            raise SecureAggregationError("an announced public key is not one of X25519") from error
