"""The server's side of one exchange of secure aggregation: announce groups, and open their sums."""

from collections.abc import Mapping
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
        present = [name for name in holders if name in survivors]
        values = [masked[name].get(key) for name in present]
        sizes = {value.shape for value in values if value is not None}
        if len(sizes) != 1 or any(value is None for value in values):
            continue
        total = np.zeros(sizes.pop(), np.uint32)
        for value in values:
            if value is not None:
                add(total, value, 1)
        seeds = [
            seed
            for name in present
            for seed in _seeds(revealed.get(name), key, name, [other for other in holders if other not in survivors])
        ]
        if any(seed is None or len(seed) != SEED_BYTES for seed, _ in seeds):
            continue
        for seed, sign in seeds:
            if seed is not None:
                add(total, stream(seed, len(total)), -sign)
        sums[key] = GroupSum(total, tuple(present))
    return sums


def _seeds(revealed: Revealed | None, key: str, name: str, lost: list[str]) -> list[tuple[bytes | None, int]]:
    """Return the seeds and signs of the masks that a survivor's value still has in the sum; None for a missing seed."""
    if revealed is None:
        return [(None, 1)]
    pairs = revealed.pairs.get(key, {})
    return [(revealed.own.get(key), 1), *((pairs.get(other), sign_of(name, other)) for other in lost)]
