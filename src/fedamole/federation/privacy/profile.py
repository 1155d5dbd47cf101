"""`privacy.profile`: settings of other tables that suit a private run, where the config does not set them itself.

The noise of a step has a norm of about noise * clip * sqrt(P) for P trained values, against a signal of at most
clip * batch. So a private run trains few values, with a large batch. An assignment that follows the data would send
mean embeddings, for which there is no noise, so it stays as it was drawn. With three holders of each expert, a client
that subtracts its own update from a mean has the sum of two others, not the update of one.
"""

from collections.abc import Collection, Mapping
from typing import Any

BATCH = 64
"""Expected number of examples in a step."""
RANK = 4
HOLDERS = 3
"""Clients k_c that hold an expert; FedAMoLE then has 2 experts for each client."""


def profile_settings(tables: Mapping[str, Mapping[str, Any]], fields: Collection[str]) -> dict[str, dict[str, Any]]:
    """Return what the profile of a config sets, by table; nothing without a profile.

    A key is left out if the config has it, or has another one that decides the same. `fields` are the settings of the
    config's method.
    """
    if tables.get("privacy", {}).get("profile") != "private":
        return {}
    of_training, of_method = tables.get("training", {}), tables.get("method", {})
    settings: dict[str, dict[str, Any]] = {"training": {}, "method": {}}
    if not {"batch_size", "accumulation"} & of_training.keys():
        settings["training"]["batch_size"] = BATCH
    if "rank" in fields and "rank" not in of_method:
        settings["method"]["rank"] = RANK
        if "alpha" not in of_method:
            settings["method"]["alpha"] = 2.0 * RANK
    if {"assignment", "min_holders"} <= set(fields):
        if "assignment" not in of_method:
            settings["method"]["assignment"] = "static"
        if not {"min_holders", "expert_choices"} & of_method.keys():
            settings["method"]["min_holders"] = HOLDERS
    return {table: values for table, values in settings.items() if values}
