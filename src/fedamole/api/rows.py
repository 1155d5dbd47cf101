"""Rows that are given in Python, as files that a run can read again when it is resumed."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from fedamole.config import Table
from fedamole.data.settings import SourceSettings
from fedamole.errors import DataError
from fedamole.files import write_atomic
from fedamole.received.names import quoted

if TYPE_CHECKING:
    import datasets
    import pandas

Rows: TypeAlias = Union["str | Path", Iterable[Mapping[str, Any]], "pandas.DataFrame", "datasets.Dataset"]
"""Rows of one source: the path of a data file, a list of dictionaries, a pandas DataFrame or a Dataset."""

MAX_DEPTH = 20
"""Maximum nesting of lists and dictionaries in a value."""


def sources_of(data: Mapping[str, Any], folder: Path) -> list[Table]:
    """Return `[[data.source]]` tables for data given in Python, and write the rows that are not in a file yet.

    Args:
        data: By name of the source, its `Rows`; or a dictionary with the key "train", optionally "test", and any other
            key of `[[data.source]]`, such as "template". A `datasets.DatasetDict` is such a dictionary.
        folder: Where rows are written, as JSON Lines. A file's name contains a hash of its content, so that equal rows
            are written once, and nothing is overwritten.

    Raises:
        ConfigError: The name of a source cannot be one.
        DataError: A source has no rows, or a value cannot be written as JSON. The message names source, row and column.
            No file was written.
    """
    if not isinstance(data, Mapping) or not data:
        raise DataError('data must be a dictionary with rows by client, such as {"north": rows}')
    tables, texts = [], dict[Path, str]()

    def path_of(rows: Any, where: str, name: str) -> str:
        if isinstance(rows, str | Path):
            return str(Path(rows).expanduser().resolve())
        text = _json_lines(_records(rows, where), where)
        path = (folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl").resolve()
        texts[path] = text
        return str(path)

    for name, entry in data.items():
        where = f"data[{name!r}]"
        options = dict(entry) if isinstance(entry, Mapping) else {"train": entry}
        if "train" not in options:
            raise DataError(f"{where}: the key 'train' is missing; keys are {', '.join(map(str, options))}")
        train, test = options.pop("train"), options.pop("test", None)
        SourceSettings(name=str(name), path="rows")  # checks the name, which becomes part of a file's name
        table: Table = {"name": str(name), "path": path_of(train, where, str(name))}
        if test is not None:
            table["test"] = path_of(test, f"{where}['test']", f"{name}-test")
        options.pop("validation", None)  # of a DatasetDict; a run takes its own from the training rows
        tables.append(table | options)
    for path, text in texts.items():
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, text)
    return tables


def _records(rows: Any, where: str) -> Iterable[Any]:
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):  # pandas
        records: Iterable[Any] = rows.to_dict("records")
        return records
    if isinstance(rows, Iterable) and not isinstance(rows, bytes):
        return rows
    raise DataError(
        f"{where}: {type(rows).__name__} is not rows; give a path, a list of dictionaries, a DataFrame or a Dataset"
    )


def _json_lines(rows: Iterable[Any], where: str) -> str:
    lines = []
    for index, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise DataError(f"{where}, row {index}: {type(row).__name__} is not a dictionary of columns")
        values = {str(key): _plain(value, f"{where}, row {index}, column {key!r}") for key, value in row.items()}
        lines.append(json.dumps(values, ensure_ascii=False))
    if not lines:
        raise DataError(f"{where} has no rows")
    return "".join(f"{line}\n" for line in lines)


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """Return a value as JSON has it; NaN, which pandas puts where a value is missing, becomes null."""
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:  # a NumPy scalar
        value = value.item()
    if isinstance(value, float) and math.isnan(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if depth < MAX_DEPTH and isinstance(value, Mapping):
        return {str(key): _plain(item, where, depth + 1) for key, item in value.items()}
    if depth < MAX_DEPTH and isinstance(value, list | tuple):
        return [_plain(item, where, depth + 1) for item in value]
    raise DataError(
        f"{where}: a {quoted(type(value).__name__)} cannot be stored as JSON; convert it to text or numbers"
    )
