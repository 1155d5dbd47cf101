"""The text of a template with the values of a row in place of the columns."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from fedamole.data.examples import Span
from fedamole.errors import DataError

Piece = tuple[str, str | None]
"""Literal text and the name of the column whose value follows it; None at the end of the template."""


class Filled(NamedTuple):
    """A template's text with the values of a row, and the spans of the template's own text in it."""

    text: str
    literals: tuple[Span, ...]


def fill(pieces: Iterable[Piece], row: Mapping[str, Any], where: str, missing: str | None = None) -> Filled:
    """Join literals and values; `missing` replaces empty values, which otherwise raise DataError."""
    parts: list[str] = []
    literals: list[Span] = []
    length = 0
    for literal, column in pieces:
        parts.append(literal)
        if literal:
            literals.append((length, length + len(literal)))
        length += len(literal)
        if column is None:
            continue
        if row[column] is None and missing is None:
            raise DataError(f"{where}: column {column!r} is empty; fill it in or remove the row")
        parts.append(missing if row[column] is None and missing is not None else text_of(row[column], column, where))
        length += len(parts[-1])
    return Filled("".join(parts), tuple(literals))


def text_of(value: Any, column: str, where: str) -> str:
    """Return a value as text; raise DataError if it is missing, bytes, a list or an object.

    Strings are unchanged, numbers of a JSON file keep their literal, booleans become true/false, and values of typed
    columns (Parquet) use Python's `str`: `1`, `2.5`, `2024-03-01 08:30:00`.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None or isinstance(value, list | dict | bytes):
        kind = "no value" if value is None else "bytes" if isinstance(value, bytes) else "a list or an object"
        raise DataError(f"{where}: column {column!r} contains {kind}; a template requires text or a number")
    return str(value)
