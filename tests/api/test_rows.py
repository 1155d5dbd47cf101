"""Rows given in Python: the files they become, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest

from fedamole.api.rows import sources_of
from fedamole.errors import DataError

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "ä\n", "completion": "c"}]


def lines(path: str) -> list[Any]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    "rows",
    [ROWS, tuple(ROWS), iter(ROWS), pandas.DataFrame(ROWS), datasets.Dataset.from_list(ROWS)],
    ids=["list", "tuple", "iterator", "pandas", "datasets"],
)
def test_equal_rows_become_one_file(tmp_path: Path, rows: Any) -> None:
    first, second = sources_of({"north": ROWS}, tmp_path), sources_of({"north": rows}, tmp_path)
    assert first == second
    assert [path.name for path in tmp_path.iterdir()] == [Path(first[0]["path"]).name]
    assert lines(first[0]["path"]) == ROWS


def test_other_rows_leave_earlier_files_alone(tmp_path: Path) -> None:
    (first,) = sources_of({"north": ROWS}, tmp_path)
    (second,) = sources_of({"north": ROWS[:1]}, tmp_path)
    assert lines(first["path"]) == ROWS
    assert lines(second["path"]) == ROWS[:1]


def test_a_file_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert sources_of({"a": "x.jsonl", "b": Path("y.csv")}, tmp_path / "data") == [
        {"name": "a", "path": str(tmp_path / "x.jsonl")},
        {"name": "b", "path": str(tmp_path / "y.csv")},
    ]
    assert not (tmp_path / "data").exists()


def test_test_rows_and_other_keys_of_a_source(tmp_path: Path) -> None:
    splits = datasets.DatasetDict({name: datasets.Dataset.from_list(ROWS) for name in ("train", "validation", "test")})
    (table,) = sources_of({"north": splits}, tmp_path)
    assert list(table) == ["name", "path", "test"]
    assert lines(table["test"]) == ROWS
    (table,) = sources_of({"north": {"train": ROWS, "template": "plain", "limit": 5}}, tmp_path)
    assert (table["template"], table["limit"]) == ("plain", 5)


def test_values_of_numpy_and_pandas(tmp_path: Path) -> None:
    frame = pandas.DataFrame({"text": ["a", None], "label": [np.int64(3), 4], "part": [0.5, math.nan]})
    (table,) = sources_of({"north": frame}, tmp_path)
    assert lines(table["path"]) == [
        {"text": "a", "label": 3, "part": 0.5},
        {"text": None, "label": 4, "part": None},
    ]
    (table,) = sources_of({"north": [{"turns": ({"role": "user", "content": "a"},), "flag": True}]}, tmp_path)
    assert lines(table["path"]) == [{"turns": [{"role": "user", "content": "a"}], "flag": True}]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "data must be a dictionary with rows by client"),
        ([ROWS], "data must be a dictionary with rows by client"),
        ({"north": []}, "data['north'] has no rows"),
        ({"north": 5}, "data['north']: int is not rows"),
        ({"north": ["a"]}, "data['north'], row 1: str is not a dictionary"),
        ({"north": {"rows": ROWS}}, "data['north']: the key 'train' is missing; keys are rows"),
        ({"north": {"train": ROWS, "test": []}}, "data['north']['test'] has no rows"),
        ({"north": [{"day": pandas.Timestamp(0)}]}, "data['north'], row 1, column 'day': a 'Timestamp' cannot be"),
    ],
)
def test_mistakes_name_source_row_and_column(tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        sources_of(data, tmp_path)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_error_has_no_value_of_a_row(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        sources_of({"north": [{"text": {"secret"}}]}, tmp_path)
    assert "secret" not in str(caught.value)
