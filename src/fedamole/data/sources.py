"""Rows of a source: JSON lines, CSV and Parquet files, or a data set of the Hugging Face hub."""

import difflib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedamole.data.layouts import Number, Row, arrange
from fedamole.data.library_rows import TEXT_READERS, ClassNames, read_hub, read_parquet, read_text_rows
from fedamole.data.settings import SourceSettings
from fedamole.errors import DataError

FORMATS = (*(f"{suffix}{gz}" for suffix in TEXT_READERS for gz in ("", ".gz")), ".parquet")
"""Endings of the files that can be read."""
MOST_COLUMNS = 2000
"""Different keys of a JSON file's rows: a file with more has data where the names of columns belong."""


@dataclass(frozen=True)
class Table:
    """The rows of one file or hub split in the column layouts that templates know."""

    # Base name of the file, or the hub id with its split: what errors and manifests call it.
    where: str
    rows: tuple[Row, ...]
    # Over the rows as they were read, before columns were renamed.
    sha256: str

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns, which all rows share."""
        return tuple(self.rows[0])

    def row_name(self, index: int) -> str:
        """How errors call a row; they count from 1."""
        return f"{self.where}, row {index + 1}"


def read_source(source: SourceSettings, base_folder: Path) -> tuple[Table, Table | None]:
    """The rows of a source and of its official test, if it has one.

    Relative paths start at `base_folder`. All rows are held in memory. Raises DataError for a file that is
    missing, empty, of an unknown kind or unreadable, and for a column to rename that is not there.
    """
    if source.path is not None:
        train = _read_file(source, base_folder / source.path)
        return train, None if source.test is None else _read_file(source, base_folder / source.test)
    assert source.split is not None  # SourceSettings saw to it
    train = _read_hub(source, source.split)
    return train, None if source.test_split is None else _read_hub(source, source.test_split)


def digest(rows: Sequence[Any]) -> str:
    """SHA-256 over rows in canonical JSON, one a line: the same values give the same in any format.

    A number counts as a number if Python writes it as the file does (`1`, `2.5`), else as the text of its literal
    (`1.10`). CSV holds text alone, so its `1` is the text and not the number.
    """
    total = hashlib.sha256()
    for row in rows:
        text = json.dumps(row, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=_canonical)
        total.update(text.encode("utf-8", "surrogatepass") + b"\n")
    return total.hexdigest()


def _canonical(value: object) -> object:
    text = str(value)
    if isinstance(value, Number) and len(text) < 4000:  # Python refuses to convert longer ones
        number: object = json.loads(text)
        return number if str(number) == text else text
    return text


def _read_file(source: SourceSettings, path: Path) -> Table:
    where = f"source {source.name!r}, {path.name}"
    if not path.is_file():
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1)
        guess = f"; did you mean {near[0]!r}?" if near else "; paths are relative to the config file's folder"
        raise DataError(f"source {source.name!r}: there is no file {path}{guess}")
    if not path.name.endswith(FORMATS):
        raise DataError(f"{where}: the file's kind is not known; known are {', '.join(FORMATS)}")
    if path.suffix == ".parquet":
        rows, classes = read_parquet(path, where)
    else:
        rows, classes = read_text_rows(path, path.name, where), {}
    return _table(source, path.name, where, rows, classes)


def _read_hub(source: SourceSettings, split: str) -> Table:
    assert source.hub is not None
    where = f"source {source.name!r}, hub data set {source.hub!r} split {split!r}"
    rows, classes = read_hub(source.hub, source.config, split, where)
    return _table(source, f"{source.hub}:{split}", where, rows, classes)


def _table(source: SourceSettings, name: str, where: str, rows: list[Row], classes: ClassNames) -> Table:
    columns = dict.fromkeys(column for row in rows for column in row)
    if not columns:
        problem = "its rows have no columns" if rows else "the file is empty, there are no rows in it"
        raise DataError(f"{where}: {problem}")
    if len(columns) > MOST_COLUMNS:
        raise DataError(
            f"{where}: its {len(rows)} rows have {len(columns)} different keys, at most {MOST_COLUMNS} can be read; "
            "write rows that share their keys"
        )
    # Every row has every column. The rows also share the names: JSON Lines bring each row's own.
    for index, row in enumerate(rows):
        rows[index] = {column: row.get(column) for column in columns}
    sha256 = digest(rows)
    for column, names in classes.items():
        # Hub data sets keep the names of their classes apart from the numbers; templates want the names.
        if f"{column}_text" not in columns:
            for row in rows:
                label = row[column]
                row[f"{column}_text"] = None if label is None or label < 0 else names[label]
    return Table(name, arrange(rows, source.columns, where, source.template), sha256)
