"""Short names of clients for figures: without their common beginning, and without the middle of long names."""

import re
from collections.abc import Sequence

LONGEST = 22
"""Most characters of a name in a figure."""


def short_names(names: Sequence[str], longest: int = LONGEST) -> dict[str, str]:
    """Return a short name for each name; all short names are different.

    Names are unchanged if all of them fit. Otherwise a common beginning that ends with a separator becomes `…`, and the
    middle of a name that is still too long becomes `…`. If two names would then be equal, more characters are kept.

    Args:
        names: Different names.
        longest: Most characters of a short name, at least 3.
    """
    if all(len(name) <= longest for name in names):
        return {name: name for name in names}
    begin = len(common_beginning(names))
    parts = [f"…{name[begin:]}" if begin > 1 else name for name in names]
    while len({_without_middle(part, longest) for part in parts}) < len(parts):
        longest += 1
    return {name: _without_middle(part, longest) for name, part in zip(names, parts, strict=True)}


def common_beginning(names: Sequence[str]) -> str:
    """Return the common beginning of several names up to its last separator (white space or one of `-_./:`)."""
    if len(names) < 2:
        return ""
    first, last = min(names), max(names)  # all names between them begin with what these two have in common
    length = next(
        (index for index, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first)
    )
    separator = re.match(r".*[-_./:\s]", first[:length], re.DOTALL)
    return separator[0] if separator else ""


def _without_middle(name: str, longest: int) -> str:
    if len(name) <= longest:
        return name
    end = (longest - 1) // 2
    return f"{name[: longest - 1 - end]}…{name[len(name) - end :]}"


def note_on_short_names(short: dict[str, str]) -> str:
    """Return a sentence that explains the short names; empty if no name is shortened."""
    if all(name == shown for name, shown in short.items()):
        return ""
    begin = common_beginning(list(short))
    left_out = f"the common beginning {begin!r} and the middle" if len(begin) > 1 else "the middle"
    return f"Figures leave out {left_out} of long client names; tables have the full names."
