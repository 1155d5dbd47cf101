"""Clients of secure aggregation with real keys, and what they hold."""

import functools
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec

from fedamole.deployment.security.keys import new_key
from fedamole.federation.secure.journal import Journal
from fedamole.federation.secure.participant import Participant
from fedamole.federation.secure.statements import Announcement, Context
from fedamole.federation.secure.sums import announce

NAMES = ("ann", "bob", "cleo", "dan", "eve")
CLIP = 2.0
HOLDERS = {"x": NAMES, "y": ("ann", "bob", "cleo")}
CONTEXT = Context("run", 4, 0)


@functools.cache
def key_of(name: str) -> ec.EllipticCurvePrivateKey:
    """A deployment key, as `fedamole certs --own` makes it."""
    return new_key()


def participants(folder: Path, names: Collection[str] = NAMES, min_group: int = 3) -> dict[str, Participant]:
    """New clients whose journals are in a folder; they hold each other's verifying keys."""
    roster = {name: key_of(name).public_key() for name in names}
    return {
        name: Participant(
            name, key_of(name), roster, Journal(folder / f"{name}.jsonl"), run="run", min_group=min_group, clip=CLIP
        )
        for name in names
    }


def announced(
    clients: Mapping[str, Participant], holders: Mapping[str, tuple[str, ...]], context: Context
) -> Announcement:
    advertisements = {name: client.advertise(context) for name, client in clients.items()}
    return announce(context, advertisements, holders, dict.fromkeys(holders, False), 3)


def random_values(
    holders: Mapping[str, tuple[str, ...]], seed: int, numbers: int = 3
) -> dict[str, dict[str, np.ndarray]]:
    generator = np.random.default_rng(seed)
    values: dict[str, dict[str, np.ndarray]] = {name: {} for name in NAMES}
    for key, names in holders.items():
        for name in names:
            values[name][key] = generator.normal(0, 1.5, numbers)
    return values
