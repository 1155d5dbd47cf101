"""The settings that all parties of a deployed run share, and those that each keeps to itself."""

import hashlib
import json
import re
from dataclasses import asdict, fields
from pathlib import Path

from fedamole.config import Config, Table
from fedamole.errors import BaseModelError, ConfigError
from fedamole.federation.secure.settings import refuse_deployment
from fedamole.model.base import BUNDLED, is_path, named_base
from fedamole.runs.identity import Identity

SHARED = ("method", "base", "data", "federation", "training", "evaluation")
"""Tables of the config that the server sends, without its own file locations."""
OWN = {
    "method": ("server_base",),
    "data": ("source", "manifest", "public"),
    "run": ("folder", "device", "threads", "group", "trackers"),
}
"""Keys that every party sets for itself; `public` and `server_base` are the coordinator's alone."""
NO_IMAGES = "base.images = true: images are supported by `fedamole run`, and not yet by deployments and simulate"
FORM_ERROR = "the server's settings are not in the expected format: use the same version of fedamole everywhere"
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")


def shared_tables(config: Config, identity: Identity) -> Table:
    """Return what a server sends to each client: the identity of the base and the shared settings.

    If the server's copy of the base is a folder or a file, its path is not sent.
    """
    tables = config.tables()
    shared = {name: dict(tables[name]) for name in (*SHARED, "run")}
    for name, keys in OWN.items():
        for key in keys:
            shared[name].pop(key, None)
    if not _is_public(str(shared["base"]["model"])):
        shared["base"]["model"] = ""
    return {"identity": asdict(identity), "config": shared}


def agreed_hash(shared: Table) -> str:
    """Return the SHA-256 of the shared settings of a run, as 64 hexadecimal digits.

    The hash is the same at all parties: it covers the canonical JSON (sorted keys, no spaces, ASCII) of
    `shared_tables`.
    """
    text = json.dumps(shared, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check_agree(given: str) -> str:
    """Return the value of --agree in lower case; ConfigError if it is not a complete hash.

    A prefix would be unsafe: a coordinator could find two configs with the same prefix in minutes.
    """
    if not re.fullmatch("[0-9a-fA-F]{64}", given):
        raise ConfigError(
            f"--agree {given}: give the complete hash that `fedamole server` prints (64 characters, 0-9 and a-f)"
        )
    return given.lower()


def own_tables(settings: Table, source: Table, run: Table, base: str | None) -> Table:
    """Return a client's config: the shared settings with the client's own data, machine and copy of the base.

    `base` is the client's own name of the base. Without it, the server may name the bundled base or a hub id, never a
    path. Raises ConfigError and BaseModelError.
    """
    shared, identity = settings.get("config"), settings.get("identity")
    identity_keys = {field.name for field in fields(Identity)}
    if not isinstance(shared, dict) or not isinstance(identity, dict) or set(identity) != identity_keys:
        raise ConfigError(FORM_ERROR)
    if set(shared) != {*SHARED, "run"} or not all(isinstance(table, dict) for table in shared.values()):
        raise ConfigError(FORM_ERROR)
    tables: Table = {name: dict(table) for name, table in shared.items()}
    for name, keys in OWN.items():
        if forbidden := sorted(set(keys) & set(tables[name])):
            raise ConfigError(f"the server sets {name}.{forbidden[0]}, which every client sets for itself")
    base_name = str(tables["base"].get("model", BUNDLED))
    if base is None and not _is_public(base_name):
        raise BaseModelError(
            f"the server's base is a folder or a file, or one with its name exists "
            f"here{base_name and f' ({base_name})'}: give your copy of the same model with --base"
        )
    if tables["base"].get("images"):
        raise ConfigError(f"the server sets {NO_IMAGES}")
    tables["base"]["model"] = named_base(base) if base is not None else base_name
    tables["run"] |= run
    tables["data"]["source"] = [source]
    return tables


def refuse_run_only(config: Config) -> None:
    """Raise ConfigError for settings that so far work in one process alone."""
    refuse_deployment(config.secure_aggregation)
    if config.base.images:
        raise ConfigError(NO_IMAGES)


def _is_public(base_name: str) -> bool:
    """Return whether a base is the bundled one or may be a hub id, which mean the same on every machine."""
    return base_name == BUNDLED or (
        bool(HUB_ID.fullmatch(base_name)) and not is_path(base_name) and not Path(base_name).exists()
    )
