"""`privacy.profile`: settings of other tables that suit a private run, where the config does not set them itself.

The noise of a step has a norm of about noise * clip * sqrt(P) for P trained values, against a signal of at most
clip * batch. So a private run trains few values, with a large batch. An assignment that follows the data would send
mean embeddings, for which there is no noise, so it stays as it was drawn. With three holders of each expert, a client
that subtracts its own update from a mean has the sum of two others, not the update of one.
"""

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fedamole.received.names import cut

log = logging.getLogger(__name__)

BATCH = 64
"""Expected number of examples in a step."""
RANK = 4
HOLDERS = 3
"""Clients k_c that hold an expert; FedAMoLE then has 2 experts for each client."""


_ASSIGNED = ("assignment", "min_holders")
_SETTINGS: tuple[tuple[str, str, Any, tuple[str, ...], tuple[str, ...]], ...] = (
    ("training", "batch_size", BATCH, ("batch_size", "accumulation"), ()),
    ("method", "rank", RANK, ("rank",), ("rank",)),
    ("method", "alpha", 2.0 * RANK, ("alpha", "rank"), ("rank",)),
    ("method", "assignment", "static", ("assignment",), _ASSIGNED),
    ("method", "min_holders", HOLDERS, ("min_holders", "expert_choices"), _ASSIGNED),
)
"""Table, key and value of each setting; keys of the table that decide the same; settings that the method must have."""


def profile_settings(
    tables: Mapping[str, Mapping[str, Any]], fields: Collection[str]
) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
    """Return what the profile of a config sets, by table, and what it does not set, in words; both empty without it.

    A key is left out if the config has it, or has another one that decides the same; there are no words about it if the
    config has the profile's value. `fields` are the settings of the config's method.
    """
    if tables.get("privacy", {}).get("profile") != "private":
        return {}, ()
    settings: dict[str, dict[str, Any]] = {}
    not_applied = []
    for table, key, value, deciding, needed in _SETTINGS:
        if not set(needed) <= set(fields):
            continue
        stored = tables.get(table, {})
        present = [name for name in deciding if name in stored]
        if not present:
            settings.setdefault(table, {})[key] = value
        elif present[0] != key or stored[key] != value:
            shown = cut(json.dumps(stored[present[0]], default=str), 40)
            not_applied.append(f"{table}.{key} = {json.dumps(value)} (the config has {table}.{present[0]} = {shown})")
    return settings, tuple(not_applied)


def warn_not_applied(not_applied: Sequence[str]) -> None:
    """Warn of the values of the profile that a config replaces."""
    if not_applied:
        log.warning("privacy.profile has not set %s; these values keep the noise small", ", ".join(not_applied))
