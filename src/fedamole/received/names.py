"""Names that become parts of paths: clients, rows of a run, sources."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable

from fedamole.errors import FedamoleError, RunError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""What a name is made of: no separator, no `..`, nothing that a terminal, a page or a shell could obey."""
_PLAIN = re.compile(r"[a-z0-9]+(?:[._-][a-z0-9]+)*")
"""A text that can be a name as it is. It has no two dashes in a row, which mark the names made for all other texts."""
LONGEST_NAME = 120
"""Characters of a name; with what is put around it, it stays below the 255 bytes that file systems allow."""
_PORTS = {port + digit for port in ("com", "lpt") for digit in "123456789\u00b9\u00b2\u00b3"}
_DEVICES = frozenset({"aux", "con", "conin$", "conout$", "nul", "prn", *_PORTS})


def not_on_windows(name: str) -> str:
    """Return why Windows could have no folder of this name, as the end of an error's text; empty if it could.

    A run folder may be copied to such a system, where `con`, `NUL.txt` and the like are devices, and a dot at the end
    of a name is dropped.
    """
    if name.partition(".")[0].rstrip().lower() in _DEVICES:
        return "on Windows this is a device and no folder; choose another name"
    return "on Windows the dot at its end is dropped; choose another name" if name.endswith(".") else ""


def quoted(value: object, most: int = 80) -> str:
    """Return a value for an error's text: as Python writes it, in ASCII, cut to `most` characters."""
    return cut(ascii(value), most)


def cut(text: str, most: int) -> str:
    """Return a text, or as much of its beginning as fits into `most` characters with " ..." behind it."""
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def checked_name(name: object, what: str, error: type[FedamoleError] = RunError) -> str:
    """Return a name that may become a part of a path; anything else is an error of the given class.

    `what` says in the error's text what is named, for example `client of runs/demo/manifest.json`.
    """
    if not isinstance(name, str) or len(name) > LONGEST_NAME or not NAME.fullmatch(name):
        raise error(
            f"{what}: the name {quoted(name)} cannot be used; a name is 1 to {LONGEST_NAME} ASCII letters, "
            "digits, dots, dashes and underscores, and begins with a letter or a digit"
        )
    if why := not_on_windows(name):
        raise error(f"{what}: the name {quoted(name)} cannot be used: {why}")
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
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip(".-_")[:most].rstrip(".") or "run"
    return f"run-{name}"[:most] if not_on_windows(name) else name


def joined_name(prefix: str, text: str) -> str:
    """Return a name that begins with a name of at most 80 characters; different texts have different names.

    A text of the letters a to z and digits, with single dots, dashes or underscores in between, follows the prefix as
    it is: `site-north_2`. For any other text follow its ASCII letters and digits in lower case, two dashes, and 12
    hexadecimal digits of its SHA-256: `North 2` gives `site-north-2--fe46084cc054`. The name depends on nothing but
    the two texts. No two names of one prefix differ only in case.
    """
    room = LONGEST_NAME - len(prefix) - 1
    if len(text) <= room and _PLAIN.fullmatch(text):
        return f"{prefix}-{text}"
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    letters = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    readable = re.sub(r"[^a-z0-9]+", "-", letters).strip("-")[: min(40, room - 14)].strip("-")
    return f"{prefix}{readable and '-'}{readable}--{digest}"
