"""Read rows of CSV files; all values are text."""

import csv
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from fedamole.data.layouts import Row
from fedamole.data.text_file import open_text
from fedamole.errors import DataError
from fedamole.received.names import quoted

DELIMITERS = (",", ";", "\t")
"""Delimiters in the order they are tried: the first that splits the header is used."""
MAX_FIELD_LENGTH = 2**31 - 1
"""Maximum length of a field: the largest value the csv module accepts on every system. Its default is 131,072."""

log = logging.getLogger(__name__)


def read_csv(path: Path, where: str, gzipped: bool) -> list[Row]:
    """Read the rows of a CSV file; its first line that is not blank is the header.

    Blank lines are skipped. A first column without a name (the index of a saved table) is left out, and so are empty
    columns without a name. A warning counts rows that a stray quote seems to have joined. Raises DataError, with the
    line number and without the content, for a row with more or fewer fields than the header, for wrong quotes, and for
    columns without a name or with the same name.
    """
    with open_text(path, where, gzipped) as file, _long_fields():
        lines = enumerate(file, start=1)
        number, first = next(((number, line) for number, line in lines if line.strip(" ,;\t\r\n")), (0, ""))
        if not first:
            return []
        splitting = (mark for mark in DELIMITERS if len(next(csv.reader([first], delimiter=mark))) > 1)
        delimiter = next(splitting, ",")
        reader = csv.reader(chain([first], (line for _, line in lines)), delimiter=delimiter, strict=True)
        records = _records(reader, where, number - 1)
        _, _, header = next(records)
        rows: list[list[str]] = []
        joined: list[tuple[int, int]] = []
        last = number
        for start, last, fields in records:
            if len(fields) == 1 < len(header) and not fields[0].strip():
                continue
            if len(fields) != len(header):
                spans = f"; the row extends to line {last}, so look for a stray quote" if last > start else ""
                raise DataError(
                    f"{where}, line {start}: the row has {len(fields)} fields and the header has {len(header)}{spans}; "
                    f"correct the row, and write text that contains a {_name(delimiter)} in double quotes"
                )
            if last > start and _looks_joined(fields, delimiter):
                joined.append((start, last))
            rows.append(fields)
    if joined:
        log.warning(
            "%s: %d lines were read as %d rows; %d of the rows look like several rows joined by a stray quote, the "
            "first at lines %d to %d: check the quotes there",
            where,
            last,
            len(rows),
            len(joined),
            *joined[0],
        )
    columns = _columns(header, rows, where)
    return [{name: fields[index] for index, name in columns.items()} for fields in rows]


def _records(reader: "Iterator[list[str]]", where: str, skipped: int) -> Iterator[tuple[int, int, list[str]]]:
    """Yield first line number, last line number and fields of each record; empty lines are skipped."""
    last = skipped
    while True:
        start = last + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "end of data" in str(error):
                problem = "a field of this row begins with a quote that is not closed"
            else:
                problem = "text follows the closing quote of a field"
            raise DataError(
                f"{where}, line {start}: {problem}; remove a stray quote, and write a quote inside a quoted field twice"
            ) from error
        last = skipped + reader.line_num  # type: ignore[attr-defined]
        if fields:
            yield start, last, fields


def _looks_joined(fields: Sequence[str], delimiter: str) -> bool:
    """Whether each line of a record with line breaks would be a complete row by itself.

    A stray quote makes a field extend to the next quote: over the end of one row, complete rows, and the beginning of
    another one. Delimiters before a space or at the end of a line count as punctuation.
    """
    delimiters = len(fields) - 1
    for index, field in enumerate(fields):
        counts = [len(re.findall(rf"{delimiter}(?=\S)", line)) for line in re.split(r"\r\n|\r|\n", field)]
        counts[-1] += field.endswith(delimiter)  # a closing quote follows
        # The field's first line completes the row that began with the fields before it; its last line begins the row
        # that the fields after it complete.
        ends_fit = counts[0] == delimiters - index and counts[-1] == index
        if delimiters and len(counts) > 1 and ends_fit and set(counts[1:-1]) <= {delimiters}:
            return True
    return False


def _columns(header: Sequence[str], records: Sequence[Sequence[str]], where: str) -> dict[int, str]:
    """Return index and name of the columns to keep."""
    columns = {index: name for index, name in enumerate(header) if name.strip()}
    for index in set(range(1, len(header))) - set(columns):
        if any(fields[index].strip() for fields in records):
            raise DataError(f"{where}: column {index + 1} has values but no name; name it in the header")
    if len(columns) < len(header):
        log.info("%s: %d columns without a name were left out", where, len(header) - len(columns))
    names = list(columns.values())
    if duplicate := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"{where}: the header has the column {quoted(duplicate, 60)} twice; rename one of them")
    return columns


def _name(delimiter: str) -> str:
    return {",": "comma", ";": "semicolon", "\t": "tab"}[delimiter]


@contextmanager
def _long_fields() -> Iterator[None]:
    """Allow long fields, and restore the csv module's limit afterwards: it applies to the whole process."""
    limit = csv.field_size_limit(MAX_FIELD_LENGTH)
    try:
        yield
    finally:
        csv.field_size_limit(limit)
