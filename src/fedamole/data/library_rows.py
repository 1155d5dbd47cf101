"""Rows read by the `datasets` library: Parquet files, and data sets of the Hugging Face hub."""

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
"""Kinds of text files by their ending; each may also be packed, with .gz behind it."""
ClassNames = dict[str, list[str]]
"""Names of the classes of a column that holds their numbers."""


def read_parquet(path: Path, where: str) -> tuple[list[Row], ClassNames]:
    """Read a Parquet file, whose columns have declared types: nothing is guessed. See `plain_value` for the values."""
    # The library caches what it reads as Arrow files, under names made from path and time. A folder of our own that
    # goes away leaves nothing behind and never serves an old reading; reading again costs far less than training.
    with tempfile.TemporaryDirectory(prefix="fedamole-") as cache:
        # The library takes a path for a pattern, in which brackets and stars have a meaning.
        files = glob.escape(str(path.resolve()))
        return _load(where, {"path": "parquet", "split": "train", "data_files": files, "cache_dir": cache})


def read_hub(hub: str, config: str | None, split: str, where: str) -> tuple[list[Row], ClassNames]:
    """Read a split of a data set of the hub, or of a folder laid out like one.

    JSON and CSV files whose types the data set does not declare are downloaded and read as local files are; the
    library would guess the types of their columns. Downloads stay in the library's usual cache.
    """
    from datasets import DownloadManager, ReadInstruction, load_dataset_builder

    with _errors(where), _quiet():
        files = _undeclared_text_files(load_dataset_builder(hub, config))
        wanted = {name: found for name, found in files.items() if re.search(rf"\b{re.escape(name)}\b", split)}
        local = {name: DownloadManager().download(found) for name, found in wanted.items()}
    if not wanted:
        return _load(where, {"path": hub, "name": config, "split": split})
    rows = {
        name: [
            row
            for url, path in zip(found, local[name], strict=True)
            for row in read_text_rows(Path(path), url, f"{where}, {Path(url).name}")
        ]
        for name, found in wanted.items()
    }
    with _errors(where):
        parts = ReadInstruction.from_spec(split).to_absolute({name: len(found) for name, found in rows.items()})
    return [row for part in parts for row in rows[part.splitname][part.from_ : part.to]], {}


def read_text_rows(path: Path, name: str, where: str) -> list[Row]:
    """Read a JSON or CSV file, the kind of which its `name` tells."""
    plain = name.removesuffix(".gz")
    reader = next(reader for suffix, reader in TEXT_READERS.items() if plain.endswith(suffix))
    return reader(path, where, plain != name)


def _undeclared_text_files(builder: Any) -> dict[str, list[str]]:
    """The JSON or CSV files of each split; nothing where the data set declares types or a layout of its own."""
    from datasets.packaged_modules.csv.csv import Csv
    from datasets.packaged_modules.json.json import Json

    config = builder.config
    if not isinstance(builder, Json | Csv) or builder.info.features is not None:
        return {}
    standard = type(config)()
    named = {"name", "version", "data_dir", "data_files", "description"}
    options = [field.name for field in dataclasses.fields(config) if field.name not in named]
    files = {str(split): [str(file) for file in found] for split, found in config.data_files.items()}
    every = [file.removesuffix(".gz") for found in files.values() for file in found]
    if any(getattr(config, name) != getattr(standard, name) for name in options):
        return {}
    return files if all(file.endswith(tuple(TEXT_READERS)) for file in every) else {}


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
    """Return a number of a typed column as a value whose text is the shortest that gives the same number.

    A float of 16 or 32 bits becomes the float whose text is the short one (0.1, not 0.10000000149011612), NaN becomes
    None (a missing value), and a decimal its digits, all of them.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if dtype.startswith("decimal"):
        return format(value, "f")
    return float(str(np.dtype(dtype).type(value))) if dtype in ("float16", "float32") else value


@contextmanager
def _errors(where: str) -> Iterator[None]:
    """Turn the library's errors, and those of pyarrow and the network that it lets through, into a DataError.

    Those that come up while rows are read may quote them, so only their kind is told.
    """
    from datasets.exceptions import DatasetGenerationError

    try:
        yield
    except Exception as error:
        kind = type(error.__cause__ or error).__name__
        told = "" if isinstance(error, DatasetGenerationError) else str(error).strip()
        first_line = told.partition("\n")[0][:300]
        raise DataError(f"{where}: cannot be read: {kind}{': ' if first_line else ''}{first_line}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's progress bars and log, which are settings of the whole process: put back afterwards.

    Its log repeats errors that this module reports, and may quote rows.
    """
    import datasets

    shown, level = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()
