"""What all parties of a deployed run agree on: the tables of the server's config that travel, and those that do not."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedamole.config import Config, Table
from fedamole.errors import BaseModelError, ConfigError
from fedamole.model.base import BUNDLED, Identity

SHARED = ("method", "base", "data", "federation", "training", "evaluation")
"""Tables that a server sends whole, but for where its own files lie."""
OWN = {"data": ("source", "manifest"), "run": ("folder", "device", "threads", "group", "tensorboard")}
"""Keys that everybody has for itself."""


def shared_tables(config: Config, identity: Identity) -> Table:
    """What a server tells each client: the identity of the base, and the settings that all share."""
    tables = config.tables()
    told = {name: dict(tables[name]) for name in (*SHARED, "run")}
    for name, keys in OWN.items():
        for key in keys:
            told[name].pop(key, None)
    return {"identity": asdict(identity), "config": told}


def own_tables(settings: Table, source: Table, run: Table, base: str | None) -> Table:
    """A client's config: what the server told, with the client's own data, machine and copy of the base.

    `base` is the client's own name for the base; without one the server may name the bundled base or a hub id, never
    a path. Raises ConfigError and BaseModelError.
    """
    told = settings.get("config")
    if not isinstance(told, dict) or set(told) != {*SHARED, "run"} or not isinstance(settings.get("identity"), dict):
        raise ConfigError("the server's settings are not in the expected form: use one version of fedamole everywhere")
    tables = {name: dict(_table(told, name)) for name in told}
    for name, keys in OWN.items():
        if foreign := sorted(set(keys) & set(tables[name])):
            raise ConfigError(f"the server sets {name}.{foreign[0]}, which is each client's own")
    named = str(tables["base"].get("model", BUNDLED))
    if base is None and named != BUNDLED and (named.startswith((".", "/", "~")) or Path(named).is_absolute()):
        raise BaseModelError(
            f"the server's base lies in a folder of its own, {named}: name your copy of the same model by --base"
        )
    tables["base"]["model"] = base or named
    tables["run"] |= run
    tables["data"]["source"] = [source]
    return tables


def _table(tables: Table, name: str) -> dict[str, Any]:
    found = tables[name]
    if not isinstance(found, dict):
        raise ConfigError(f"the server's table {name} is none")
    return found
