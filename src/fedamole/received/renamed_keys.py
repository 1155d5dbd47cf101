"""Config keys that were renamed: a stored config of an earlier version gets the new names, a new one is refused."""

from collections.abc import Mapping
from typing import Any

from fedamole.errors import ConfigError

RENAMED = {
    "run": {"tensorboard": "trackers"},
    "deployment": {"patience": "max_wait"},
    "method": {"fallback": "max_excess"},
}
"""Old names of keys with their new ones, by table; only configs that earlier versions stored may have them."""
NEW_VALUES: dict[str, dict[bool, Any]] = {
    "fallback": {True: 0.0, False: 40.0},
    "tensorboard": {True: ["tensorboard"], False: []},
}
"""New values of renamed keys that have others than before, by old name and old value."""


def with_new_names(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return tables with the new names and values of keys that were renamed."""
    return {
        section: dict(_renamed(section, key, value) for key, value in table.items())
        if section in RENAMED and isinstance(table, dict)
        else table
        for section, table in tables.items()
    }


def _renamed(section: str, key: str, value: Any) -> tuple[str, Any]:
    """Return the present name and value of a key that may have been renamed."""
    if isinstance(value, bool) and key in RENAMED[section]:
        value = NEW_VALUES.get(key, {}).get(value, value)
    return RENAMED[section].get(key, key), value


def refuse_old_names(section: str, table: Mapping[str, Any]) -> None:
    """Raise ConfigError if a table has a key by its old name; the error names the new one."""
    for old, new in RENAMED.get(section, {}).items():
        if old in table:
            values = "".join(f", {value} for {was}" for was, value in NEW_VALUES.get(old, {}).items()).lower()
            raise ConfigError(f"{section}.{old} is now called {section}.{new}: rename it{values}")
