"""Read rows with the `datasets` library: Parquet files, and data sets of the Hugging Face Hub."""

import dataclasses
import glob
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fedamole.data.csv_rows import read_csv
from fedamole.data.json_rows import read_json
from fedamole.data.layouts import Row
from fedamole.errors import DataError

TEXT_READERS: Mapping[str, Callable[[Path, str, bool], list[Row]]] = {
    ".jsonl": read_json,
    ".json": read_json,
    ".csv": read_csv,
}
"""Readers of text files by suffix; each file may also be compressed, with the suffix .gz appended."""
ClassNames = dict[str, list[str]]
"""Class names of each column that contains class numbers."""


def read_parquet(path: Path, where: str) -> tuple[list[Row], ClassNames]:
    """Read a Parquet file. Its columns have declared types; `plain_value` converts their values."""
    # The library caches Arrow files under names made from path and time. A temporary cache leaves nothing behind and is
    # never stale; reading again costs far less than training.
    with tempfile.TemporaryDirectory(prefix="fedamole-") as cache:
        # The library interprets a path as a glob pattern.
        files = glob.escape(str(path.resolve()))
        return _load(where, {"path": "parquet", "split": "train", "data_files": files, "cache_dir": cache})


def read_hub(hub: str, config: str | None, split: str, where: str) -> tuple[list[Row], ClassNames]:
    """Read a split of a Hub data set, or of a local folder with the structure of one.

    JSON and CSV files for which the data set declares no types are downloaded and read like local files, because the
    library would guess the types of their columns. Downloads stay in the library's cache.
    """
    from datasets import DownloadManager, ReadInstruction, load_dataset_builder

    with _errors(where), _quiet():
        files = _undeclared_text_files(load_dataset_builder(hub, config))
        needed = {name: urls for name, urls in files.items() if re.search(rf"\b{re.escape(name)}\b", split)}
        local = {name: DownloadManager().download(urls) for name, urls in needed.items()}
    if not needed:
        return _load(where, {"path": hub, "name": config, "split": split})
    rows = {
        name: [
            row
            for url, path in zip(urls, local[name], strict=True)
            for row in read_text_rows(Path(path), url, f"{where}, {Path(url).name}")
        ]
        for name, urls in needed.items()
    }
    with _errors(where):
        sizes = {name: len(split_rows) for name, split_rows in rows.items()}
        parts = ReadInstruction.from_spec(split).to_absolute(sizes)
    return [row for part in parts for row in rows[part.splitname][part.from_ : part.to]], {}


def read_text_rows(path: Path, name: str, where: str) -> list[Row]:
    """Read a JSON or CSV file; the suffix of `name` selects the reader."""
    plain = name.removesuffix(".gz")
    reader = next(reader for suffix, reader in TEXT_READERS.items() if plain.endswith(suffix))
    return reader(path, where, plain != name)


def _undeclared_text_files(builder: Any) -> dict[str, list[str]]:
    """Return the JSON or CSV files by split; empty if the data set declares types or reader options."""
    from datasets.packaged_modules.csv.csv import Csv
    from datasets.packaged_modules.json.json import Json

    config = builder.config
    if not isinstance(builder, Json | Csv) or builder.info.features is not None:
        return {}
    default_config = type(config)()
    other_fields = {"name", "version", "data_dir", "data_files", "description"}
    options = [field.name for field in dataclasses.fields(config) if field.name not in other_fields]
    files = {str(split): [str(file) for file in split_files] for split, split_files in config.data_files.items()}
    names = [file.removesuffix(".gz") for split_files in files.values() for file in split_files]
    if any(getattr(config, name) != getattr(default_config, name) for name in options):
        return {}
    return files if all(name.endswith(tuple(TEXT_READERS)) for name in names) else {}


def _load(where: str, options: Mapping[str, Any]) -> tuple[list[Row], ClassNames]:
    from datasets import ClassLabel, Value, load_dataset

    with _errors(where), _quiet():
        loaded = load_dataset(**options)
        rows: list[Row] = loaded.to_list()
    for column, feature in loaded.features.items():
        if isinstance(feature, Value) and feature.dtype.startswith(("float", "decimal")):
            for row in rows:
                row[column] = plain_value(row[column], feature.dtype)
    classes = {name: kind.names for name, kind in loaded.features.items() if isinstance(kind, ClassLabel)}
    return rows, classes


def plain_value(value: Any, dtype: str) -> Any:
    """Convert a number of a typed column to a value with the shortest text that represents it.

    A 16- or 32-bit float becomes the Python float with the same short text (0.1, not 0.10000000149011612), NaN becomes
    None (a missing value), and a decimal becomes a string with all its digits.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if dtype.startswith("decimal"):
        return format(value, "f")
    return float(str(np.dtype(dtype).type(value))) if dtype in ("float16", "float32") else value


@contextmanager
def _errors(where: str) -> Iterator[None]:
    """Convert errors of the library, of pyarrow and of the network to DataError.

    Errors raised while rows are read may quote rows, so only their type is reported.
    """
    from datasets.exceptions import DatasetGenerationError

    try:
        yield
    except Exception as error:
        kind = type(error.__cause__ or error).__name__
        message = "" if isinstance(error, DatasetGenerationError) else str(error).strip()
        first_line = message.partition("\n")[0][:300]
        raise DataError(f"{where}: cannot be read: {kind}{': ' if first_line else ''}{first_line}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Disable the library's progress bars and log, and restore these process-wide settings afterwards.

    The log repeats errors that this module reports, and may quote rows.
    """
    import datasets

    had_progress_bar, level = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if had_progress_bar:
            datasets.enable_progress_bars()
