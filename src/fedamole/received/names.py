"""Validation of names that become parts of paths: clients, variants of a run, data sources."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable

from fedamole.errors import FedamoleError, RunError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""Pattern of a name: no separator, no `..`, no character with a meaning for a terminal, a web page or a shell."""
_PLAIN = re.compile(r"[a-z0-9]+(?:[._-][a-z0-9]+)*")
"""Pattern of a text that can be used as a name unchanged. It never has two dashes in a row, which mark names generated
for all other texts."""
LONGEST_NAME = 120
"""Maximum length of a name in characters; with a prefix and suffix it stays below the 255 bytes that file systems
allow."""
_PORTS = {port + digit for port in ("com", "lpt") for digit in "123456789\u00b9\u00b2\u00b3"}
_DEVICES = frozenset({"aux", "con", "conin$", "conout$", "nul", "prn", *_PORTS})


def not_on_windows(name: str) -> str:
    """Return the reason why Windows does not allow a folder of this name, for an error message; empty if it does.

    A run folder may be copied to Windows. There, `con`, `NUL.txt` and similar names are devices, and a dot at the end
    of a name is removed.
    """
    if name.partition(".")[0].rstrip().lower() in _DEVICES:
        return "on Windows this name is a device, not a folder; choose another name"
    return "on Windows the dot at the end is removed; choose another name" if name.endswith(".") else ""


def quoted(value: object, most: int = 80) -> str:
    """Return a value for an error text: its ASCII `repr`, cut to `most` characters."""
    return cut(ascii(value), most)


def cut(text: str, most: int) -> str:
    """Return a text, or as much of its beginning as fits into `most` characters, followed by " ..."."""
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def checked_name(name: object, what: str, error: type[FedamoleError] = RunError) -> str:
    """Return a name that may become part of a path; raise an error of the given class for any other.

    `what` says in the error text what the name belongs to, for example `client of runs/demo/manifest.json`.
    """
    if not isinstance(name, str) or len(name) > LONGEST_NAME or not NAME.fullmatch(name):
        raise error(
            f"{what}: the name {quoted(name)} is invalid; use 1 to {LONGEST_NAME} ASCII letters, "
            "digits, dots, dashes and underscores, and start with a letter or a digit"
        )
    if why := not_on_windows(name):
        raise error(f"{what}: the name {quoted(name)} is invalid: {why}")
    return name


def checked_names(names: Iterable[object], what: str, error: type[FedamoleError] = RunError) -> tuple[str, ...]:
    """Return names that may become sibling folders: each is valid, and no two are equal when lower-cased."""
    seen: dict[str, str] = {}
    for name in names:
        valid = checked_name(name, what, error)
        if (other := seen.get(valid.lower())) is not None:
            raise error(
                f"{what}: the names {quoted(other)} and {quoted(valid)} would be the same folder on a "
                "case-insensitive file system; rename one of them"
            )
        seen[valid.lower()] = valid
    return tuple(seen.values())


def as_name(text: str, most: int = 64) -> str:
    """Convert any text, such as the name of a run, to a valid name."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip(".-_")[:most].rstrip(".") or "run"
    return f"run-{name}"[:most] if not_on_windows(name) else name


def joined_name(prefix: str, text: str) -> str:
    """Return a name that starts with a prefix of at most 80 characters; different texts give different names.

    A text of the letters a to z and digits, with single dots, dashes or underscores in between, is appended unchanged:
    `site-north_2`. For any other text, the suffix is its ASCII letters and digits in lower case, two dashes, and the
    first 12 hexadecimal digits of its SHA-256: `North 2` gives `site-north-2--fe46084cc054`. The name depends only on
    the two texts. No two names with the same prefix differ only in case.
    """
    available = LONGEST_NAME - len(prefix) - 1
    if len(text) <= available and _PLAIN.fullmatch(text):
        return f"{prefix}-{text}"
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    letters = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    readable = re.sub(r"[^a-z0-9]+", "-", letters).strip("-")[: min(40, available - 14)].strip("-")
    return f"{prefix}{readable and '-'}{readable}--{digest}"
