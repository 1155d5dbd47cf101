"""Parquet files and Hub data sets."""

import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from fedamole.data.filling import text_of
from fedamole.data.settings import SourceSettings
from fedamole.data.sources import digest, read_source
from fedamole.errors import DataError

SECRET = "zebra-4711"


def parquet_texts(folder: Path, values: list[Any], kind: Any) -> list[str | None]:
    pyarrow.parquet.write_table(pyarrow.table({"a": pyarrow.array(values, kind)}), folder / "d.parquet")
    rows = read_source(SourceSettings("s", path="d.parquet"), folder)[0].rows
    return [None if row["a"] is None else text_of(row["a"], "a", "f") for row in rows]


DAY = datetime.datetime(2024, 3, 1, 8, 30)


@pytest.mark.parametrize(
    ("values", "kind", "texts"),
    [
        (
            ["2024-03-01", "2024-03-01T08:30:00Z", "1", None],
            pyarrow.string(),
            ["2024-03-01", "2024-03-01T08:30:00Z", "1", None],
        ),
        (["1.10"], pyarrow.large_string(), ["1.10"]),
        ([1, 2**62, None], pyarrow.int64(), ["1", str(2**62), None]),
        ([1.0, 2.5, float("nan")], pyarrow.float64(), ["1.0", "2.5", None]),
        ([0.1, 2.5, None], pyarrow.float32(), ["0.1", "2.5", None]),
        ([decimal.Decimal("1.10"), decimal.Decimal("0.00")], pyarrow.decimal128(20, 9), ["1.100000000", "0.000000000"]),
        ([True, False], pyarrow.bool_(), ["true", "false"]),
        ([DAY.date()], pyarrow.date32(), ["2024-03-01"]),
        ([DAY], pyarrow.timestamp("ms"), ["2024-03-01 08:30:00"]),
        ([DAY], pyarrow.timestamp("ns"), ["2024-03-01 08:30:00"]),
        ([DAY], pyarrow.timestamp("us", tz="UTC"), ["2024-03-01 08:30:00+00:00"]),
    ],
    ids=lambda value: str(value) if isinstance(value, pyarrow.DataType) else "",
)
def test_values_of_typed_columns(tmp_path: Path, values: list[Any], kind: Any, texts: list[str | None]) -> None:
    assert parquet_texts(tmp_path, values, kind) == texts


def test_numbers_have_one_hash_in_json_and_parquet(tmp_path: Path) -> None:
    rows = [{"a": "x", "n": 1, "f": 2.5}, {"a": "y", "n": 2, "f": 0.5}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    hashes = {read_source(SourceSettings("s", path=name), tmp_path)[0].sha256 for name in ("d.parquet", "d.jsonl")}
    assert hashes == {digest(rows)}


def hub(folder: Path, split: str) -> tuple[dict[str, Any], ...]:
    return read_source(SourceSettings("s", hub=str(folder), split=split), folder)[0].rows


@pytest.mark.parametrize(
    ("name", "values"),
    [("train.jsonl", ["2024-03-01", "2024-03-02", "2024-03-03", "2024-03-04"]), ("train.csv", ["1", "007", "2", "3"])],
)
def test_text_files_of_a_hub_data_set_are_read_as_local_ones(tmp_path: Path, name: str, values: list[str]) -> None:
    """A folder of files is read like a Hub data set, without a network."""
    lines = ["a,b", *(f"{value},x" for value in values)]
    if name.endswith(".jsonl"):
        lines = [json.dumps({"a": value, "b": "x"}) for value in values]
    (tmp_path / name).write_text("\n".join(lines))
    (tmp_path / name.replace("train", "test")).write_text("\n".join(lines[:3]))
    assert [row["a"] for row in hub(tmp_path, "train")] == values
    assert [row["a"] for row in hub(tmp_path, "train[1:3]")] == values[1:3]
    assert [row["a"] for row in hub(tmp_path, "train[:1]+test[:1]")] == values[:1] * 2
    with pytest.raises(DataError, match="cannot be read: ValueError: Unknown split"):
        hub(tmp_path, "validation")


def test_declared_types_of_a_hub_data_set_hold(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n')
    names = "{class_label: {names: {'0': bad, '1': good}}}"
    features = f"- name: text\n    dtype: string\n  - name: label\n    dtype: {names}"
    (tmp_path / "README.md").write_text(f"---\ndataset_info:\n  features:\n  {features}\n---\n")
    assert [row["label_text"] for row in hub(tmp_path, "train")] == ["good", "bad"]


def test_an_error_of_the_library_does_not_quote_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "train.jsonl").write_text(f'{{"a": "{SECRET}"}}\n')
    (tmp_path / "README.md").write_text("---\ndataset_info:\n  features:\n  - name: a\n    dtype: int64\n---\n")
    with pytest.raises(DataError, match=r"hub data set .* cannot be read: ArrowInvalid$") as error:
        hub(tmp_path, "train")
    assert SECRET not in str(error.value)
    assert caplog.text == "", "the library's own log says it again"


def test_a_broken_file_of_a_hub_data_set_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(f'{{"a": "x"}}\n{{"a": "{SECRET}\n')
    with pytest.raises(DataError, match=r"hub data set .*, train.jsonl, line 2: cannot be read as JSON") as error:
        hub(tmp_path, "train")
    assert SECRET not in str(error.value)
