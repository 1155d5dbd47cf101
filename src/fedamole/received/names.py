"""Names that become parts of paths: clients, rows of a run, sources."""

import re
from collections.abc import Iterable

from fedamole.errors import FedamoleError, RunError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""What a name is made of: no separator, no `..`, nothing that a terminal, a page or a shell could obey."""
LONGEST_NAME = 120
"""Characters of a name; with what is put around it, it stays below the 255 bytes that file systems allow."""


def quoted(value: object, most: int = 80) -> str:
    """Return a value for an error's text: as Python writes it, in ASCII, cut to `most` characters."""
    text = ascii(value)
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def checked_name(name: object, what: str, error: type[FedamoleError] = RunError) -> str:
    """Return a name that may become a part of a path; anything else is an error of the given class.

    `what` says in the error's text what is named, for example `client of runs/demo/manifest.json`.
    """
    if not isinstance(name, str) or len(name) > LONGEST_NAME or not NAME.fullmatch(name):
        raise error(
            f"{what}: the name {quoted(name)} cannot be used; a name is 1 to {LONGEST_NAME} letters, digits, dots, "
            "dashes and underscores, and begins with a letter or a digit"
        )
    return name


def checked_names(names: Iterable[object], what: str, error: type[FedamoleError] = RunError) -> tuple[str, ...]:
    """Return names that may become folders beside each other: each usable, no two the same in lower case."""
    seen: dict[str, str] = {}
    for name in names:
        good = checked_name(name, what, error)
        if (other := seen.get(good.lower())) is not None:
            raise error(
                f"{what}: the names {quoted(other)} and {quoted(good)} would be one folder where upper and lower case "
                "are the same; rename one of them"
            )
        seen[good.lower()] = good
    return tuple(seen.values())


def as_name(text: str, most: int = 64) -> str:
    """Make a name that may become a part of a path of any text, for example of a run's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip(".-_")[:most] or "run"
