"""Rows of a source: JSON lines, CSV and Parquet files, or a data set of the Hugging Face hub."""

import csv
import difflib
import glob
import gzip
import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedamole.data.layouts import Row, arrange
from fedamole.data.settings import SourceSettings
from fedamole.errors import DataError

FORMATS = {
    ".jsonl": "json",
    ".jsonl.gz": "json",
    ".json": "json",
    ".json.gz": "json",
    ".csv": "csv",
    ".csv.gz": "csv",
    ".parquet": "parquet",
}


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
    """SHA-256 over rows in canonical JSON, one a line: the same content gives the same in any format."""
    total = hashlib.sha256()
    for row in rows:
        text = json.dumps(row, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
        total.update(text.encode("utf-8", "surrogatepass") + b"\n")
    return total.hexdigest()


def _read_file(source: SourceSettings, path: Path) -> Table:
    where = f"source {source.name!r}, {path.name}"
    if not path.is_file():
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1)
        guess = f"; did you mean {near[0]!r}?" if near else "; paths are relative to the config file's folder"
        raise DataError(f"source {source.name!r}: there is no file {path}{guess}")
    suffix = next((suffix for suffix in FORMATS if path.name.endswith(suffix)), None)
    if suffix is None:
        raise DataError(f"{where}: the file's kind is not known; known are {', '.join(FORMATS)}")
    options: dict[str, Any] = {"path": FORMATS[suffix], "split": "train"}
    if FORMATS[suffix] != "parquet":
        options |= _text_options(path, where, FORMATS[suffix])
    # The library takes a path for a pattern, in which brackets and stars have a meaning.
    options["data_files"] = glob.escape(str(path.resolve()))
    # It caches what it reads as Arrow files, under names made from path and time. A folder of our own that goes
    # away leaves nothing behind and never serves an old reading; parsing again costs far less than training.
    with tempfile.TemporaryDirectory(prefix="fedamole-") as cache:
        return _load(source, path.name, where, {**options, "cache_dir": cache})


def _text_options(path: Path, where: str, kind: str) -> dict[str, Any]:
    """What a look into a text file decides; DataError for one without content, or that is no UTF-8 CSV.

    Reading every CSV column as text keeps "007" and "NA" what they are, which guessed types would not.
    """
    opener = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file if kind == "csv" else [])
            header = next(reader, [])
            empty = not (any(reader) if kind == "csv" else file.read(1))
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{where}: cannot be read as UTF-8 text: {error}") from error
    if empty:
        raise DataError(f"{where}: the file is empty, there are no rows in it")
    if kind != "csv":
        return {}
    from datasets import Features, Value

    features = Features({column: Value("string") for column in header})
    return {"features": features, "keep_default_na": False, "encoding": "utf-8-sig"}


def _read_hub(source: SourceSettings, split: str) -> Table:
    # Downloads are worth keeping, so the hub's data sets go through the library's usual cache.
    where = f"source {source.name!r}, hub data set {source.hub!r} split {split!r}"
    return _load(source, f"{source.hub}:{split}", where, {"path": source.hub, "name": source.config, "split": split})


def _load(source: SourceSettings, name: str, where: str, options: dict[str, Any]) -> Table:
    from datasets import ClassLabel, load_dataset

    try:
        with _quiet():
            loaded = load_dataset(**options)
    # The library lets its own errors through and those of pyarrow, pandas and the network alike.
    except Exception as error:
        cause = error.__cause__ or error
        raise DataError(f"{where}: cannot be read: {type(cause).__name__}: {cause}") from error
    rows: list[Row] = loaded.to_list()
    if not rows:
        raise DataError(f"{where}: there are no rows in it")
    sha256 = digest(rows)
    for column, feature in loaded.features.items():
        # Hub data sets keep the names of their classes apart from the numbers; templates want the names.
        if isinstance(feature, ClassLabel) and f"{column}_text" not in loaded.features:
            for row in rows:
                label = row[column]
                row[f"{column}_text"] = None if label is None or label < 0 else feature.names[label]
    return Table(name, arrange(rows, source.columns, where, source.template), sha256)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's progress bars, which are a setting of the whole process: put back afterwards."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
