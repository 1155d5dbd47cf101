"""JSON and JSON Lines: values keep their literals; errors name the line, never the content."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from fedamole.data.filling import text_of
from fedamole.data.json_rows import BY_PANDAS
from fedamole.data.layouts import Number
from fedamole.data.settings import SourceSettings
from fedamole.data.sources import Table, digest, read_source
from fedamole.errors import DataError

SECRET = "zebra-4711"
NAMES = ["d.jsonl", "d.jsonl.gz", "d.json", "d.json.gz"]


def read(folder: Path, name: str, content: str | bytes) -> Table:
    data = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
    return read_source(SourceSettings("s", path=name), folder)[0]


def texts(table: Table, column: str) -> list[str]:
    return [text_of(row[column], column, "f") for row in table.rows]


def as_json(name: str, literals: list[str]) -> str:
    """Rows with a column `a` whose values are these pieces of JSON."""
    rows = [f'{{"a": {literal}}}' for literal in literals]
    return "\n".join(rows) + "\n" if ".jsonl" in name else "[" + ",\n".join(rows) + "]"


@pytest.mark.parametrize("name", NAMES)
def test_text_that_looks_like_a_date_is_unchanged(tmp_path: Path, name: str) -> None:
    for values in (["2024-03-01", "2024-03-02"], ["2024-03-01T08:30:00Z", "2024-03-02T08:30:00Z"], ["007", "1e5"]):
        assert texts(read(tmp_path, name, as_json(name, [json.dumps(value) for value in values])), "a") == values


@pytest.mark.parametrize("name", NAMES)
def test_a_number_keeps_its_literal_whatever_the_other_rows_hold(tmp_path: Path, name: str) -> None:
    literals = ["1", "2.5", "1.10", "1e5", "-0", "12345678901234567890", "0.1000", "9" * 5000]
    assert texts(read(tmp_path, name, as_json(name, literals)), "a") == literals
    assert texts(read(tmp_path, name, as_json(name, ["1", '"x"', "true", "-2"])), "a") == ["1", "x", "true", "-2"]


def test_missing_keys_and_nested_values(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"a": "x", "tags": ["u", {"k": None}]}, {"b": None}, {"a": "y", "b": "z"}]
    table = read(tmp_path, "d.jsonl", "\n".join(map(json.dumps, rows)))
    assert table.columns == ("a", "tags", "b")
    assert list(table.rows) == [{"a": None, "tags": None, "b": None, **row} for row in rows]


def test_conversations_become_prompts(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "2024-03-01"}, {"role": "assistant", "content": "1.10", "weight": 1}]
    for content in (json.dumps({"messages": turns}), json.dumps([{"messages": turns}] * 3)):
        row = read(tmp_path, "d.json", content).rows[0]
        assert (row["prompt"], row["completion"]) == ("### User:\n2024-03-01\n\n### Assistant:\n", "1.10")


def test_nan_is_a_missing_value(tmp_path: Path) -> None:
    assert [row["a"] for row in read(tmp_path, "d.jsonl", '{"a": NaN}\n{"a": 1}').rows] == [None, Number("1")]


@pytest.mark.parametrize("late", [{"response": "text"}, {"response": "r", "context": "late"}])
def test_a_large_file_whose_late_rows_differ(tmp_path: Path, late: dict[str, Any]) -> None:
    """The `datasets` library would determine columns and types from the first 10 MB."""
    line = json.dumps({"instruction": "x" * 60_000, "response": None if "context" not in late else "r"}) + "\n"
    table = read(tmp_path, "d.jsonl.gz", line * 180 + json.dumps({"instruction": "last", **late}) + "\n")
    assert len(table.rows) == 181
    assert {key: table.rows[-1][key] for key in late} == late


@pytest.mark.parametrize(
    "content",
    [
        '[{"a": "x"}, {"a": "y"}]',
        '[\n  {\n    "a": "x"\n  },\n  {"a": "y"}\n]',
        '{"a": "x"}\r\n\r\n  {"a": "y"}',
        '{"a": "x"}\r{"a": "y"}',
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_the_content_decides_between_lines_and_a_list(tmp_path: Path, content: str, mark: str) -> None:
    for name in ("d.json", "d.jsonl"):
        assert read(tmp_path, name, mark + "\n" + content).rows == ({"a": "x"}, {"a": "y"})


def test_one_row_over_several_lines(tmp_path: Path) -> None:
    assert read(tmp_path, "d.json", '{\n  "a": "x",\n  "tags": ["u"]\n}\n').rows == ({"a": "x", "tags": ["u"]},)


@pytest.mark.parametrize(
    "shape",
    [
        {"prompt": [SECRET] * 9000, "completion": [SECRET] * 9000},
        {"prompt": {"0": SECRET, "1": SECRET}, "completion": {"0": SECRET, "1": SECRET}},
        {"columns": ["prompt"], "index": [0], "data": [[SECRET]]},
        {"data": [{"prompt": SECRET, "completion": SECRET}]},
        {SECRET + str(index): {"prompt": SECRET} for index in range(9000)},
        {"messages": [[{"role": "user", "content": SECRET}]]},
    ],
    ids=["columns", "columns of rows", "split", "wrapped", "rows under keys", "column of conversations"],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_an_object_of_columns_is_a_short_error_without_data(tmp_path: Path, shape: Any, indent: int | None) -> None:
    with pytest.raises(DataError, match=r"source 's', d.json: the file is one object with columns") as error:
        read(tmp_path, "d.json", json.dumps(shape, indent=indent))
    assert "one object per line" in str(error.value)
    assert str(error.value).count("\n") <= 1
    assert SECRET not in str(error.value)


@pytest.mark.parametrize("shape", [{"a": ["2024-03-01", "x"]}, {"a": {"0": "2024-03-01", "1": "x"}}])
def test_the_remedy_for_columns_makes_rows(tmp_path: Path, shape: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("old.json").write_text(json.dumps(shape))
    eval(BY_PANDAS.partition(": ")[2], {"pandas": pytest.importorskip("pandas")})
    table, _ = read_source(SourceSettings("s", path="new.jsonl"), tmp_path)
    assert table.rows == ({"a": "2024-03-01"}, {"a": "x"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.json", f'["{SECRET}"]', "entry 1 of the list is a string, not an object"),
        ("d.json", f'[{{"a": "{SECRET}"}}, 1]', "entry 2 of the list is a number"),
        ("d.json", f'"{SECRET}"', "contains a string, not rows"),
        ("d.jsonl", f'{{"a": "x"}}\n["{SECRET}"]\n', "line 2: contains a list, not an object"),
        ("d.jsonl", f'{{"a": "x"}}\n\n{{"a": "{SECRET}\n', "line 3: cannot be read as JSON: Invalid control"),
        ("d.jsonl", f'{{"a": "{SECRET}"\n{{"a": "y"}}\n', "line 1: cannot be read as JSON: Expecting ',' delimiter"),
        ("d.jsonl.gz", f'{{"a": "x"}}\n{{"a": "{SECRET}"', "line 2: cannot be read as JSON: Expecting ',' delimiter"),
        ("d.json", f'[{{"a": "x"}},\n{{"a": {SECRET}}}]', "line 2: cannot be read as JSON: Expecting value"),
        ("d.json", f'{{\n"a": "x",\n"b": {SECRET}\n}}', "line 3: cannot be read as JSON: Expecting value"),
        ("d.jsonl", f'{{"a": "x"}}\n{{"a": "{SECRET}"}},\n', "line 2: .*more text follows the value"),
        ("d.json", f'["{SECRET}"]\n["x"]\n', "line 2: .*more text follows the value"),
        ("d.jsonl", f'{{"a": "x"}}\n{{"a": "{SECRET}", "a": 1}}', "line 2: .*an object has the key 'a' twice"),
        ("d.jsonl", f'{{"a": "x"}}\n{{"a": "{SECRET} \\ud83d"}}', "line 2: .*half of a surrogate pair"),
        ("d.jsonl", '{"a": "x"}\n{"a": ' + "[" * 100_000 + f'"{SECRET}', "line 2: .*nested too deeply"),
        ("d.jsonl", f'{{"a": "x"}}\n{{"a": "{SECRET} é"}}'.encode("latin-1"), "line 2: cannot be read as UTF-8 text"),
        ("d.jsonl", f'{{"a": "{SECRET}"}}'.encode("utf-16"), "cannot be read as UTF-8 text: it is UTF-16"),
        ("d.json", f'{{"a": "{SECRET}"}}'.encode("utf-16-be"), "cannot be read as UTF-8 text: it is UTF-16"),
        ("d.jsonl", "{}\n{}\n", "its rows have no columns"),
        ("d.jsonl", "\n \n", "the file is empty"),
        ("d.jsonl", "".join(f'{{"{SECRET}{i}": "x"}}\n' for i in range(2001)), "2001 rows have 2001 different keys"),
    ],
)
def test_errors_name_the_place_and_never_the_content(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(DataError, match=f"source 's', {name}(, |: |: its ){message}") as error:
        read(tmp_path, name, content)
    assert SECRET not in str(error.value)
    assert len(str(error.value)) < 300


def test_pairs_of_surrogates_are_characters(tmp_path: Path) -> None:
    assert texts(read(tmp_path, "d.jsonl", '{"a": "\\ud83d\\ude00"}\n{"a": "x"}'), "a") == ["😀", "x"]


def test_a_damaged_gzip_file(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"a": "x"}\n' * 1000)[:-20])
    with pytest.raises(DataError, match=r"d.jsonl.gz: cannot be read: it is not a gzip file, or it is damaged"):
        read_source(SourceSettings("s", path="d.jsonl.gz"), tmp_path)


def test_the_hash_is_as_before_where_the_values_are(tmp_path: Path) -> None:
    """Manifests of earlier versions remain valid: the library read these values unchanged."""
    rows = [{"a": "x", "n": 1, "f": 2.5}, {"a": "y", "n": -2, "f": 0.1}]
    assert read(tmp_path, "d.jsonl", "\n".join(map(json.dumps, rows))).sha256 == digest(rows)


def test_the_hash_tells_literals_apart(tmp_path: Path) -> None:
    hashes = [read(tmp_path, "d.jsonl", f'{{"a": {literal}}}').sha256 for literal in ("1", "1.0", "1.00", "1e0")]
    assert len(set(hashes)) == 4
