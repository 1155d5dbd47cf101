"""Read the rows of a source: JSON, CSV or Parquet files, or a data set of the Hugging Face Hub."""

import difflib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedamole.data.layouts import Number, Row, arrange
from fedamole.data.library_rows import TEXT_READERS, ClassNames, read_hub, read_parquet, read_text_rows
from fedamole.data.settings import SourceSettings
from fedamole.errors import DataError

FORMATS = (*(f"{suffix}{gz}" for suffix in TEXT_READERS for gz in ("", ".gz")), ".parquet")
"""Suffixes of supported files."""
MAX_COLUMNS = 2000
"""Maximum number of different keys in a JSON file's rows; a file with more has data as keys."""


@dataclass(frozen=True)
class Table:
    """The rows of one file or Hub split, with the columns that templates use."""

    where: str
    """Name in errors and manifests: the file's base name, or the Hub id with the split."""
    rows: tuple[Row, ...]
    sha256: str
    """Hash of the rows as read, before columns were renamed."""
    folder: Path | None = None
    """Folder of the file, where paths of images start; None for a Hub split."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns; they are the same in all rows."""
        return tuple(self.rows[0])

    def row_name(self, index: int) -> str:
        """Return the name of a row for error messages, which count from 1."""
        return f"{self.where}, row {index + 1}"


def read_source(source: SourceSettings, base_folder: Path) -> tuple[Table, Table | None]:
    """Read the rows of a source, and those of its official test set if it has one.

    Relative paths start at `base_folder`. All rows are loaded into memory. Raises DataError if a file is missing,
    empty, unreadable or of an unknown format, or if a column to rename is missing.
    """
    if source.path is not None:
        train = _read_file(source, base_folder / source.path)
        return train, None if source.test is None else _read_file(source, base_folder / source.test)
    assert source.split is not None  # checked by SourceSettings
    train = _read_hub(source, source.split)
    return train, None if source.test_split is None else _read_hub(source, source.test_split)


def digest(rows: Sequence[Any]) -> str:
    """Return the SHA-256 of rows in canonical JSON, one per line. It does not depend on the file format.

    A JSON number is hashed as a number if Python writes it like the file (`1`, `2.5`), else as the text of its literal
    (`1.10`). CSV values are always text.
    """
    total = hashlib.sha256()
    for row in rows:
        text = json.dumps(row, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=_canonical)
        total.update(text.encode("utf-8", "surrogatepass") + b"\n")
    return total.hexdigest()


def _canonical(value: object) -> object:
    text = str(value)
    if isinstance(value, Number) and len(text) < 4000:  # Python does not convert longer ones
        number: object = json.loads(text)
        return number if str(number) == text else text
    return text


def _read_file(source: SourceSettings, path: Path) -> Table:
    where = f"source {source.name!r}, {path.name}"
    if not path.is_file():
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, names, n=1)
        guess = f"; did you mean {close[0]!r}?" if close else "; paths are relative to the config file's folder"
        raise DataError(f"source {source.name!r}: there is no file {path}{guess}")
    if not path.name.endswith(FORMATS):
        raise DataError(f"{where}: unknown file format; known are {', '.join(FORMATS)}")
    if path.suffix == ".parquet":
        rows, classes = read_parquet(path, where)
    else:
        rows, classes = read_text_rows(path, path.name, where), {}
    return replace(_table(source, path.name, where, rows, classes), folder=path.parent)


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
    if len(columns) > MAX_COLUMNS:
        raise DataError(
            f"{where}: its {len(rows)} rows have {len(columns)} different keys, at most {MAX_COLUMNS} are allowed; "
            "write rows that share their keys"
        )
    # Give every row every column. All rows then share the key strings, which saves memory for JSON Lines.
    for index, row in enumerate(rows):
        rows[index] = {column: row.get(column) for column in columns}
    sha256 = digest(rows)
    for column, names in classes.items():
        # Hub data sets store class names separately from class numbers; templates use the names.
        if f"{column}_text" not in columns:
            for row in rows:
                label = row[column]
                row[f"{column}_text"] = None if label is None or label < 0 else names[label]
    return Table(name, arrange(rows, source.columns, where, source.template), sha256)
