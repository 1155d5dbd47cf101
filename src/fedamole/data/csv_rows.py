"""Rows of a CSV file, every value as the text that stands there."""

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
"""Tried in this order: the first that divides the header. Spreadsheets of many countries write semicolons."""
LONGEST_FIELD = 2**31 - 1
"""Characters; the largest that the csv module takes on every system. Its own limit is 131,072."""

log = logging.getLogger(__name__)


def read_csv(path: Path, where: str, gzipped: bool) -> list[Row]:
    """Read the rows below the header, which is the first line that is not blank; blank lines are left out.

    A first column without a name, as tables with an index are saved, is left out, and so are empty columns without a
    name. A warning counts rows that a stray quote seems to have joined. Raises DataError, with the line and without
    its content, for a row with more or fewer fields than the header, wrong quotes, and columns without a name or with
    the same name.
    """
    with open_text(path, where, gzipped) as file, _long_fields():
        lines = enumerate(file, start=1)
        number, first = next(((number, line) for number, line in lines if line.strip(" ,;\t\r\n")), (0, ""))
        if not first:
            return []
        delimiter = next((mark for mark in DELIMITERS if len(next(csv.reader([first], delimiter=mark))) > 1), ",")
        reader = csv.reader(chain([first], (line for _, line in lines)), delimiter=delimiter, strict=True)
        records = _records(reader, where, number - 1)
        _, _, header = next(records)
        found: list[list[str]] = []
        joined: list[tuple[int, int]] = []
        last = number
        for start, last, fields in records:
            if len(fields) == 1 < len(header) and not fields[0].strip():
                continue
            if len(fields) != len(header):
                spans = f"; the row goes on to line {last}, so look for a stray quote" if last > start else ""
                raise DataError(
                    f"{where}, line {start}: the row has {len(fields)} fields and the header has {len(header)}{spans}; "
                    f"correct the row, and put text that holds a {_name(delimiter)} between double quotes"
                )
            if last > start and _looks_joined(fields, delimiter):
                joined.append((start, last))
            found.append(fields)
    if joined:
        log.warning(
            "%s: %d lines were read as %d rows; %d of the rows look like several that a stray quote has joined, the "
            "first at lines %d to %d: check the quotes there",
            where,
            last,
            len(found),
            len(joined),
            *joined[0],
        )
    columns = _columns(header, found, where)
    return [{name: fields[place] for place, name in columns.items()} for fields in found]


def _records(reader: "Iterator[list[str]]", where: str, skipped: int) -> Iterator[tuple[int, int, list[str]]]:
    """First line, last line and fields of each record that is not an empty line."""
    last = skipped
    while True:
        start = last + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "end of data" in str(error):
                problem = "a field of this row begins with a quote that is never closed"
            else:
                problem = "text follows the closing quote of a field"
            raise DataError(
                f"{where}, line {start}: {problem}; remove a stray quote, and write a quote inside a quoted field twice"
            ) from error
        last = skipped + reader.line_num  # type: ignore[attr-defined]
        if fields:
            yield start, last, fields


def _looks_joined(fields: Sequence[str], delimiter: str) -> bool:
    """Whether each line of a record with line breaks, read by itself, would be a whole row.

    A quote that is opened by mistake takes in what follows until the next quote: the end of one row, whole rows, and
    the beginning of another one. A delimiter before a space, or at the end of a line, is that of a sentence.
    """
    wanted = len(fields) - 1
    for place, field in enumerate(fields):
        counts = [len(re.findall(rf"{delimiter}(?=\S)", line)) for line in re.split(r"\r\n|\r|\n", field)]
        counts[-1] += field.endswith(delimiter)  # what follows it is the quote
        # The fields before this one are in its first line, those after it in its last.
        ends = counts[0] == wanted - place and counts[-1] == place
        if wanted and len(counts) > 1 and ends and set(counts[1:-1]) <= {wanted}:
            return True
    return False


def _columns(header: Sequence[str], found: Sequence[Sequence[str]], where: str) -> dict[int, str]:
    """Place and name of the columns to keep."""
    columns = {place: name for place, name in enumerate(header) if name.strip()}
    for place in set(range(1, len(header))) - set(columns):
        if any(fields[place].strip() for fields in found):
            raise DataError(f"{where}: column {place + 1} has values and no name; give it one in the header")
    if len(columns) < len(header):
        log.info("%s: %d columns without a name were left out", where, len(header) - len(columns))
    names = list(columns.values())
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"{where}: the header has the column {quoted(twice, 60)} twice; rename one of them")
    return columns


def _name(delimiter: str) -> str:
    return {",": "comma", ";": "semicolon", "\t": "tab"}[delimiter]


@contextmanager
def _long_fields() -> Iterator[None]:
    """Take long fields; the csv module's limit is a setting of the whole process, so it is put back afterwards."""
    limit = csv.field_size_limit(LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(limit)
