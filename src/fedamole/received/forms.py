"""Forms of JSON values: each form is a function that raises FormError for a value of another form.

    check_form({"round": 3}, record({"round": whole(0, 10)}), "progress.json", RunError)

A form says nothing of keys that it does not name: a newer version may write more of them.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from fedamole.errors import FedamoleError
from fedamole.received.names import LONGEST_NAME, NAME, quoted

MOST_WHOLE = 2**53
"""Largest whole number: the largest up to which every reader of JSON has the same numbers."""
MOST_KEYS = 1_000_000
"""Most entries of a list or a mapping."""

Form = Callable[[Any, str], None]
"""Called with a value and the place where it stands."""


class FormError(ValueError):
    """A value of another form than the one that was expected."""


def _refuse(value: object, where: str, wanted: str) -> FormError:
    return FormError(f"{where or 'the whole of it'} is {quoted(value)}, expected {wanted}")


def anything(value: Any, where: str) -> None:
    """Take whatever there is."""


def whole(low: int = 0, high: int = MOST_WHOLE) -> Form:
    """A whole number from `low` to `high`."""

    def form(value: Any, where: str) -> None:
        if type(value) is not int or not low <= value <= high:
            raise _refuse(value, where, f"a whole number from {low} to {high}")

    return form


def number(low: float = -1e300, high: float = 1e300, finite: bool = True) -> Form:
    """A number from `low` to `high`; without `finite` also NaN and infinity, which losses may be."""

    def form(value: Any, where: str) -> None:
        if type(value) is float and not finite and not math.isfinite(value):
            return
        if type(value) not in (int, float) or not low <= value <= high:
            raise _refuse(value, where, f"a number from {low:g} to {high:g}")

    return form


def text(most: int = 10_000, pattern: re.Pattern[str] | None = None) -> Form:
    """A text of at most so many characters that matches a pattern as a whole."""

    def form(value: Any, where: str) -> None:
        if not isinstance(value, str) or len(value) > most or (pattern and not pattern.fullmatch(value)):
            like = f" like {pattern.pattern}" if pattern else ""
            raise _refuse(value, where, f"a text of at most {most} characters{like}")

    return form


name = text(LONGEST_NAME, NAME)
"""A name that may become a part of a path."""


def boolean(value: Any, where: str) -> None:
    """True or false."""
    if not isinstance(value, bool):
        raise _refuse(value, where, "true or false")


def choice(*values: str) -> Form:
    """One of these texts."""

    def form(value: Any, where: str) -> None:
        if not isinstance(value, str) or value not in values:
            raise _refuse(value, where, f"one of {', '.join(values)}")

    return form


def either(*forms: Form) -> Form:
    """What any of these forms takes; the last one says what is wrong."""

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
    """The value null."""
    if value is not None:
        raise _refuse(value, where, "null")


def listed(one: Form, most: int = MOST_KEYS) -> Form:
    """A list of at most so many values of one form."""

    def form(value: Any, where: str) -> None:
        if not isinstance(value, list) or len(value) > most:
            raise _refuse(value, where, f"a list of at most {most} values")
        for place, inner in enumerate(value):
            one(inner, f"{where}[{place}]")

    return form


def mapping(one: Form, key: Form = name, most: int = MOST_KEYS) -> Form:
    """An object of at most so many entries whose keys and values have one form each."""

    def form(value: Any, where: str) -> None:
        if not isinstance(value, dict) or len(value) > most:
            raise _refuse(value, where, f"an object of at most {most} entries")
        for inner, item in value.items():
            key(inner, f"a key of {where}" if where else "a key")
            one(item, f"{where}.{inner}".lstrip("."))

    return form


def record(required: Mapping[str, Form], optional: Mapping[str, Form] | None = None, closed: bool = False) -> Form:
    """An object with these entries; those that are optional may be missing.

    Others are not looked at, or refused where the object is `closed`.
    """
    known = {**required, **(optional or {})}

    def form(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise _refuse(value, where, "an object")
        for key, one in known.items():
            if key in value:
                one(value[key], f"{where}.{key}".lstrip("."))
            elif key in required:
                raise FormError(f"{f'{where}.{key}'.lstrip('.')} is missing")
        if closed and (others := [key for key in value if key not in known]):
            raise FormError(f"{where or 'it'} has the key {quoted(others[0])}, which does not belong there")

    return form


def check_form(value: Any, form: Form, file: object, error: type[FedamoleError]) -> None:
    """Raise an error of the given class, which names the file, where a value is not of a form."""
    try:
        form(value, "")
    except FormError as wrong:
        raise error(f"{file} is damaged or no file of fedamole: {wrong}; put it back from a copy") from wrong
