"""Text of any kind is read back exactly, in every format and by every reader of rows."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fedamole.data import sources as module
from fedamole.data.manifest import load_federation
from fedamole.data.settings import DataSettings, SourceSettings
from fedamole.data.sources import digest, read_source
from fedamole.data.templates import BUILT_IN, render

Rows = list[dict[str, str]]
AWKWARD = [
    "",
    " ",
    "  two  spaces  ",
    "\t",
    "\r\n",
    "\r",
    "\n\n",
    "\0",
    "😀👩‍🚀",
    "שלום, עולם",
    "\u202e",
    "\ufeff",
    "\u2028\x85\x0b\x1c",
    '"',
    '""',
    "a,b;c",
    "\\",
    "\\n",
    "null",
    "NaN",
    "true",
    "1",
    "1.10",
    "1e5",
    "2024-03-01",
    "2024-03-01T08:30:00Z",
    "é",
    "e\u0301",
]
text = st.lists(st.sampled_from(AWKWARD) | st.text(max_size=8), max_size=4).map("".join)
rows_of_text = st.lists(st.fixed_dictionaries({"prompt": text, "completion": text}), min_size=1, max_size=4)


def as_csv(rows: Rows, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)


def as_lines(rows: Rows, path: Path) -> None:
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def as_packed_lines(rows: Rows, path: Path) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def as_list(rows: Rows, path: Path) -> None:
    path.write_bytes(json.dumps(rows, ensure_ascii=False, indent=1).encode())


def as_parquet(rows: Rows, path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("d.csv", as_csv),
        ("d.jsonl", as_lines),
        ("d.jsonl.gz", as_packed_lines),
        ("d.json", as_list),
        ("d.parquet", as_parquet),
    ],
)
def test_rows_are_read_back_as_written(tmp_path: Path, name: str, write: Callable[[Rows, Path], None]) -> None:
    @settings(
        max_examples=25 if name == "d.parquet" else 150,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(rows_of_text)
    @example([{"prompt": "2024-03-01", "completion": "2024-03-01T08:30:00Z"}])
    def check(rows: Rows) -> None:
        write(rows, tmp_path / name)
        table, _ = read_source(SourceSettings("s", path=name), tmp_path)
        assert list(table.rows) == rows
        assert table.sha256 == digest(rows)
        for row in rows:
            example = render(BUILT_IN["plain"], (), row, "f")
            assert example is None or (example.prompt, example.answer) == (row["prompt"], row["completion"])

    check()


def test_rows_are_read_in_one_place() -> None:
    """All commands read rows with `read_source`; only one module calls a library that infers types.

    The Python interface returns tables of results, and reads no rows.
    """
    package = Path(module.__file__).parents[1]
    for path in package.rglob("*.py"):
        calls = [word for word in ("load_dataset(", "import pandas", "csv.reader(") if word in path.read_text()]
        returns_tables = path.parent.name == "api" and calls == ["import pandas"]
        assert not calls or returns_tables or path.name in ("library_rows.py", "csv_rows.py"), path


def test_all_clients_read_alike_whatever_their_other_rows_hold(tmp_path: Path) -> None:
    """Type inference made a date a timestamp and 1 1.0 at clients with certain other rows."""
    day = '"2024-03-01"'
    values = {"one": [day, "1"], "two": [day, "1", "2.5", '"x"'], "three": [day, "1e0"]}
    for name, literals in values.items():
        lines = [f'{{"instruction": "q {at}", "response": {literals[at % len(literals)]}}}' for at in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    sources = tuple(SourceSettings(name, path=f"{name}.jsonl") for name in values)
    for shard in load_federation(DataSettings(sources), tmp_path).shards:
        answers = {example.answer for example in shard.train}
        assert answers == {literal.strip('"') for literal in values[shard.client]}
