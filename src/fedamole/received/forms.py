"""Schemas of JSON values: each form is a function that raises FormError if a value does not match.

    check_form({"round": 3}, record({"round": whole(0, 10)}), "progress.json", RunError)

Keys that a form does not name are ignored, as a newer version may write more of them.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from fedamole.errors import FedamoleError
from fedamole.received.names import LONGEST_NAME, NAME, quoted

MOST_WHOLE = 2**53
"""Largest integer that every JSON reader represents exactly (2^53)."""
MOST_KEYS = 1_000_000
"""Maximum number of entries of a list or object."""

Form = Callable[[Any, str], None]
"""Called with a value and its location in the file."""


class FormError(ValueError):
    """A value does not match its form."""


def _mismatch(value: object, where: str, expected: str) -> FormError:
    return FormError(f"{where or 'the value'} is {quoted(value)}, expected {expected}")


def anything(value: Any, where: str) -> None:
    """Accept any value."""


def whole(low: int = 0, high: int = MOST_WHOLE) -> Form:
    """An integer from `low` to `high`."""

    def form(value: Any, where: str) -> None:
        if type(value) is not int or not low <= value <= high:
            raise _mismatch(value, where, f"a whole number from {low} to {high}")

    return form


def number(low: float = -1e300, high: float = 1e300, finite: bool = True) -> Form:
    """A number from `low` to `high`; with `finite=False` also NaN and infinity, which losses may be."""

    def form(value: Any, where: str) -> None:
        if type(value) is float and not finite and not math.isfinite(value):
            return
        if type(value) not in (int, float) or not low <= value <= high:
            raise _mismatch(value, where, f"a number from {low:g} to {high:g}")

    return form


def text(most: int = 10_000, pattern: re.Pattern[str] | None = None) -> Form:
    """A string of at most `most` characters that fully matches the pattern, if one is given."""

    def form(value: Any, where: str) -> None:
        if not isinstance(value, str) or len(value) > most or (pattern and not pattern.fullmatch(value)):
            like = f" that matches {pattern.pattern}" if pattern else ""
            raise _mismatch(value, where, f"a text of at most {most} characters{like}")

    return form


name = text(LONGEST_NAME, NAME)
"""A name that may become part of a path."""


def boolean(value: Any, where: str) -> None:
    """True or false."""
    if not isinstance(value, bool):
        raise _mismatch(value, where, "true or false")


def choice(*values: str) -> Form:
    """One of the given strings."""

    def form(value: Any, where: str) -> None:
        if not isinstance(value, str) or value not in values:
            raise _mismatch(value, where, f"one of {', '.join(values)}")

    return form


def either(*forms: Form) -> Form:
    """A value that any of these forms accepts; the error is that of the last form."""

    def form(value: Any, where: str) -> None:
        for one in forms[:-1]:
            try:
                one(value, where)
            except FormError:
                continue
            return
        forms[-1](value, where)

    return form


def nothing(value: Any, where: str) -> None:
    """Null."""
    if value is not None:
        raise _mismatch(value, where, "null")


def listed(form_of_item: Form, most: int = MOST_KEYS) -> Form:
    """A list of at most `most` values of one form."""

    def form(value: Any, where: str) -> None:
        if not isinstance(value, list) or len(value) > most:
            raise _mismatch(value, where, f"a list of at most {most} values")
        for index, item in enumerate(value):
            form_of_item(item, f"{where}[{index}]")

    return form


def mapping(form_of_value: Form, key: Form = name, most: int = MOST_KEYS) -> Form:
    """An object of at most `most` entries, with one form for all keys and one for all values."""

    def form(value: Any, where: str) -> None:
        if not isinstance(value, dict) or len(value) > most:
            raise _mismatch(value, where, f"an object of at most {most} entries")
        for entry_key, item in value.items():
            key(entry_key, f"a key of {where}" if where else "a key")
            form_of_value(item, f"{where}.{entry_key}".lstrip("."))

    return form


def record(required: Mapping[str, Form], optional: Mapping[str, Form] | None = None, closed: bool = False) -> Form:
    """An object with these entries; optional entries may be missing.

    Other entries are ignored, or refused if the object is `closed`.
    """
    known = {**required, **(optional or {})}

    def form(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise _mismatch(value, where, "an object")
        for key, form_of_entry in known.items():
            if key in value:
                form_of_entry(value[key], f"{where}.{key}".lstrip("."))
            elif key in required:
                raise FormError(f"{f'{where}.{key}'.lstrip('.')} is missing")
        if closed and (unknown := [key for key in value if key not in known]):
            raise FormError(f"{where or 'it'} has the unknown key {quoted(unknown[0])}")

    return form


def check_form(value: Any, form: Form, file: object, error: type[FedamoleError]) -> None:
    """Raise an error of the given class, which names the file, if a value does not match a form."""
    try:
        form(value, "")
    except FormError as mismatch:
        raise error(f"{file} is damaged or not a file of fedamole: {mismatch}; restore it from a copy") from mismatch
