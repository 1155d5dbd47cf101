"""Read rows of JSON Lines files and of JSON lists of objects; numbers keep their literal."""

import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from fedamole.data.layouts import Number, Row
from fedamole.data.text_file import open_text
from fedamole.errors import DataError
from fedamole.received.names import quoted

SHAPE = 'write a list of objects, or one object per line, such as {"prompt": "...", "completion": "..."}'
BY_PANDAS = (
    'pandas writes columns as rows: pandas.read_json("old.json", dtype=False, convert_dates=False)'
    '.to_json("new.jsonl", orient="records", lines=True)'
)
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(path: Path, where: str, gzipped: bool) -> list[Row]:
    """Read the rows of a JSON Lines file or of a JSON document; the content decides which of the two it is.

    A number becomes a `Number` with the file's literal, and NaN (not part of JSON) becomes None. Rows may have
    different columns. Raises DataError with file and line, never with a row's content.
    """
    with open_text(path, where, gzipped) as file:
        lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
        number, first = next(lines, (0, ""))
        if not first:
            return []
        problem = None
        if first.lstrip().startswith("{"):
            try:
                parse_json_literally(first)
            except ValueError as error:
                problem = error
            else:
                return _lines(chain([(number, first)], lines), where)
        text = "\n" * (number - 1) + first + file.read()
    try:
        document = parse_json_literally(text)
    except ValueError as error:
        following = text.split("\n")[number : number + 1]
        if problem is not None and (not following or following[0].lstrip().startswith("{")):
            raise _broken(problem, where, number) from error  # JSON Lines whose first line is broken
        raise _broken(error, where, None) from error
    if isinstance(document, dict):
        return [_the_only_row(document, where)]
    if not isinstance(document, list):
        raise DataError(f"{where}: contains {_kind(document)}, not rows; {SHAPE}")
    for number, value in enumerate(document, start=1):
        if not isinstance(value, dict):
            raise DataError(f"{where}: entry {number} of the list is {_kind(value)}, not an object; {SHAPE}")
    return document


def _lines(lines: Iterator[tuple[int, str]], where: str) -> list[Row]:
    rows: list[Row] = []
    for number, line in lines:
        try:
            row = parse_json_literally(line)
        except ValueError as error:
            raise _broken(error, where, number) from error
        if not isinstance(row, dict):
            raise DataError(f"{where}, line {number}: contains {_kind(row)}, not an object; {SHAPE}")
        rows.append(row)
    return [_the_only_row(rows[0], where)] if len(rows) == 1 else rows


def _the_only_row(row: Row, where: str) -> Row:
    """Return the only object of a file; DataError if it contains columns, or rows by key, instead of one row."""
    if row and all(isinstance(value, list | dict) for value in row.values()) and not _are_turns(row.get("messages")):
        raise DataError(
            f"{where}: the file is one object with columns (or rows by key), not rows; {SHAPE}\n{BY_PANDAS}"
        )
    return row


def _are_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) and "role" in turn for turn in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of an object as a dict; ValueError if a key occurs twice."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        seen: set[str] = set()
        duplicate = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"an object has the key {quoted(duplicate, 60)} twice")
    return entries


def _constant(literal: str) -> Number | None:
    """Convert NaN, which several libraries write for a missing value, to None. JSON has neither NaN nor Infinity."""
    return None if literal == "NaN" else Number(literal)


_DECODER = json.JSONDecoder(parse_int=Number, parse_float=Number, parse_constant=_constant, object_pairs_hook=_unique)


def parse_json_literally(text: str) -> Any:
    """Parse a JSON text, with each number as a `Number` and NaN as None.

    Raises ValueError if the text is not JSON, or if an object has a key twice.
    """
    try:
        value = _DECODER.decode(text)
        if _HALF_CHARACTER.search(text):  # most are complete pairs, which can be encoded
            json.dumps(value, ensure_ascii=False, default=str).encode("utf-8")
    except RecursionError as error:
        raise ValueError("the values are nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("half of a surrogate pair (\\ud800 to \\udfff) is not a character") from error
    return value


def _broken(error: ValueError, where: str, line: int | None) -> DataError:
    """Return the error for text that is not JSON; `line` is the row's line, None uses the parser's."""
    reason = str(error)
    if isinstance(error, json.JSONDecodeError):
        message = "more text follows the value" if error.msg == "Extra data" else error.msg
        reason, line = f"{message} (column {error.colno})", line or error.lineno
    position = "" if line is None else f", line {line}"
    return DataError(f"{where}{position}: cannot be read as JSON: {reason}; correct it, or write the file again")


def _kind(value: Any) -> str:
    if isinstance(value, bool | None):
        return "null" if value is None else "true or false"
    return {str: "a string", Number: "a number", list: "a list", dict: "an object"}[type(value)]
