"""The server's side of one exchange of secure aggregation: announce groups, and open their sums."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedamole.federation.secure.fixed_point import Words
from fedamole.federation.secure.masks import SEED_BYTES, add, sign_of, stream
from fedamole.federation.secure.participant import Revealed
from fedamole.federation.secure.statements import Advertisement, Announcement, Context, Group

Masked = Mapping[str, Mapping[str, Words]]
"""Masked values (n) by client and key."""


@dataclass(frozen=True)
class GroupSum:
    """Sum of a tensor over the survivors among its holders."""

    total: Words
    clients: tuple[str, ...]
    """The clients in the sum."""


def announce(
    context: Context,
    advertisements: Mapping[str, Advertisement],
    holders: Mapping[str, tuple[str, ...]],
    relative: Mapping[str, bool],
    min_group: int,
) -> Announcement:
    """Return the announcement for tensors with these holders; those with fewer than `min_group` are left out.

    Clients that have not advertised a key hold nothing.
    """
    groups = {}
    for key, names in sorted(holders.items()):
        present = tuple(sorted(set(names) & set(advertisements)))
        if len(present) >= min_group:
            groups[key] = Group(present, relative[key])
    return Announcement(context, advertisements, groups)


def open_sums(
    announcement: Announcement,
    masked: Masked,
    survivors: frozenset[str],
    revealed: Mapping[str, Revealed],
    min_group: int,
) -> dict[str, GroupSum]:
    """Return the sum of each tensor, by key; a tensor is missing if one of its survivors gave no usable seed.

    `masked` has the values of at least all survivors. What clients sent is checked in shape only: a client that sends
    other values or seeds than it should changes the sums of its groups, as it could by its update.
    """
    sums = {}
    for key in announcement.opened(survivors, min_group):
        holders = announcement.groups[key].holders
        present = tuple(name for name in holders if name in survivors)
        lost = [name for name in holders if name not in survivors]
        values = [masked[name][key] for name in present if key in masked[name]]
        seeds = [pair for name in present for pair in _seeds_left(revealed.get(name), key, name, lost)]
        complete = len(values) == len(present) and len(seeds) == len(present) * (1 + len(lost))
        if not complete or len({value.shape for value in values}) != 1:
            continue
        total = np.zeros_like(values[0])
        for value in values:
            add(total, value, 1)
        for seed, sign in seeds:
            add(total, stream(seed, len(total)), -sign)
        sums[key] = GroupSum(total, present)
    return sums


def _seeds_left(revealed: Revealed | None, key: str, name: str, lost: Sequence[str]) -> list[tuple[bytes, int]]:
    """Return the usable seeds, with signs, of the masks that a survivor's value of a tensor leaves in the sum."""
    if revealed is None:
        return []
    pairs = revealed.pairs.get(key, {})
    seeds = [(revealed.own.get(key, b""), 1), *((pairs.get(other, b""), sign_of(name, other)) for other in lost)]
    return [(seed, sign) for seed, sign in seeds if len(seed) == SEED_BYTES]
