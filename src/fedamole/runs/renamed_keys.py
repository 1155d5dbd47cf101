"""Old names of config keys, which the config of a stored run may have."""

from typing import Any

Table = dict[str, Any]
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


def with_new_names(tables: Table) -> Table:
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
