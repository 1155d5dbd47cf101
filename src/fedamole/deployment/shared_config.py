"""What all parties of a deployed run agree on: the tables of the server's config that travel, and those that do not."""

import hashlib
import json
import re
from dataclasses import asdict, fields
from pathlib import Path

from fedamole.config import Config, Table
from fedamole.errors import BaseModelError, ConfigError
from fedamole.model.base import BUNDLED, named_base
from fedamole.runs.identity import Identity

SHARED = ("method", "base", "data", "federation", "training", "evaluation")
"""Tables that a server sends whole, but for where its own files lie."""
OWN = {"data": ("source", "manifest"), "run": ("folder", "device", "threads", "group", "tensorboard")}
"""Keys that everybody has for itself."""
FORM = "the server's settings are not in the expected form: use one version of fedamole everywhere"
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")


def shared_tables(config: Config, identity: Identity) -> Table:
    """What a server tells each client: the identity of the base, and the settings that all share.

    Where the server's own copy of the base lies in a folder, that stays untold.
    """
    tables = config.tables()
    told = {name: dict(tables[name]) for name in (*SHARED, "run")}
    for name, keys in OWN.items():
        for key in keys:
            told[name].pop(key, None)
    if not _is_public(str(told["base"]["model"])):
        told["base"]["model"] = ""
    return {"identity": asdict(identity), "config": told}


def agreed_hash(shared: Table) -> str:
    """SHA-256 of everything that each client is told of a run's config, as 64 hexadecimal digits.

    The same on all sides: over canonical JSON (sorted keys, no spaces, ASCII) of what `shared_tables` returns.
    """
    text = json.dumps(shared, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check_agree(given: str) -> str:
    """Return what --agree was given, in lower case; ConfigError where it is no whole hash.

    The beginning of a hash would not do: a coordinator could make two configs that begin alike in minutes.
    """
    if not re.fullmatch("[0-9a-fA-F]{64}", given):
        raise ConfigError(f"--agree {given}: give the whole hash that `fedamole server` prints (64 times 0-9, a-f)")
    return given.lower()


def own_tables(settings: Table, source: Table, run: Table, base: str | None) -> Table:
    """A client's config: what the server told, with the client's own data, machine and copy of the base.

    `base` is the client's own name for the base; without one the server may name the bundled base or a hub id, never
    a path. Raises ConfigError and BaseModelError.
    """
    told, identity = settings.get("config"), settings.get("identity")
    parts = {field.name for field in fields(Identity)}
    if not isinstance(told, dict) or not isinstance(identity, dict) or set(identity) != parts:
        raise ConfigError(FORM)
    if set(told) != {*SHARED, "run"} or not all(isinstance(table, dict) for table in told.values()):
        raise ConfigError(FORM)
    tables: Table = {name: dict(table) for name, table in told.items()}
    for name, keys in OWN.items():
        if foreign := sorted(set(keys) & set(tables[name])):
            raise ConfigError(f"the server sets {name}.{foreign[0]}, which is each client's own")
    named = str(tables["base"].get("model", BUNDLED))
    if base is None and not _is_public(named):
        raise BaseModelError(
            f"the server's base lies in a folder, or there is one here of the same name{named and f' ({named})'}: "
            "name your copy of the same model by --base"
        )
    tables["base"]["model"] = named_base(base) if base is not None else named
    tables["run"] |= run
    tables["data"]["source"] = [source]
    return tables


def _is_public(named: str) -> bool:
    """Whether a base is the bundled one or can be a hub id, which mean the same everywhere."""
    return named == BUNDLED or (bool(HUB_ID.fullmatch(named)) and not Path(named).exists())
