import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedamole.data.settings import SourceSettings
from fedamole.data.sources import digest, read_source
from fedamole.errors import DataError

ROWS = [{"text": 'a, "b"\nc', "label": "007"}, {"text": "é", "label": "NA"}]


def write_as(folder: Path, name: str) -> None:
    if name.endswith(".parquet"):
        from datasets import Dataset

        Dataset.from_list(ROWS).to_parquet(str(folder / name))
        return
    if ".csv" in name:
        text = 'text,label\n"a, ""b""\nc",007\né,NA\n'
    elif ".jsonl" in name:
        text = "".join(json.dumps(row) + "\n" for row in ROWS)
    else:
        text = json.dumps(ROWS)
    data = text.encode()
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)


@pytest.mark.parametrize(
    "name",
    ["d.jsonl", "d.jsonl.gz", "d.json", "d.json.gz", "d.csv", "d.csv.gz", "d.parquet"],
)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    write_as(tmp_path, name)
    table, test = read_source(SourceSettings("s", path=name), tmp_path)
    assert list(table.rows) == ROWS
    assert (table.where, table.columns, test) == (name, ("text", "label"), None)
    assert table.sha256 == digest(ROWS)


@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.parquet"])
def test_a_path_is_no_pattern(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "new [1] *"
    folder.mkdir()
    write_as(folder, name)
    assert len(read_source(SourceSettings("s", path=name), folder)[0].rows) == 2


def test_the_hash_is_of_content_not_of_column_order() -> None:
    assert digest([{"a": 1, "b": 2}]) == digest([{"b": 2, "a": 1}])
    assert digest([{"a": 1}, {"a": 2}]) != digest([{"a": 2}, {"a": 1}])


def test_reading_leaves_no_cache_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    write_as(tmp_path, "d.parquet")
    read_source(SourceSettings("s", path="d.parquet"), tmp_path)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_no_progress_bar_is_shown_and_the_setting_is_put_back(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import datasets

    write_as(tmp_path, "d.parquet")
    capfd.readouterr()
    level = datasets.logging.get_verbosity()
    read_source(SourceSettings("s", path="d.parquet"), tmp_path)
    assert capfd.readouterr() == ("", "")
    assert datasets.is_progress_bar_enabled()
    assert datasets.logging.get_verbosity() == level


def test_an_official_test_file_and_renamed_columns(write: Callable[..., str], tmp_path: Path) -> None:
    write("train.jsonl", [{"q": "1", "a": "2"}])
    write("test.jsonl", [{"q": "3", "a": "4"}])
    columns = {"prompt": "q", "completion": "a"}
    source = SourceSettings("s", path="train.jsonl", test="test.jsonl", columns=columns)
    train, test = read_source(source, tmp_path)
    assert train.rows == ({"q": "1", "a": "2", "prompt": "1", "completion": "2"},)
    assert test is not None
    assert test.rows[0]["prompt"] == "3"


def test_a_hub_data_set_gets_the_names_of_its_classes(tmp_path: Path) -> None:
    """A folder of Parquet files is read like a Hub data set, without a network."""
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    Dataset.from_dict({"text": ["x", "y"], "label": [1, -1]}, features=features).to_parquet(
        str(tmp_path / "train-00000-of-00001.parquet")
    )
    train, test = read_source(SourceSettings("s", hub=str(tmp_path), split="train"), tmp_path)
    assert [row["label_text"] for row in train.rows] == ["good", None]
    assert test is None


def test_a_missing_file_names_the_nearest(write: Callable[..., str], tmp_path: Path) -> None:
    write("train.jsonl", [{"a": 1}])
    with pytest.raises(DataError, match=r"source 's': there is no file .*trian.jsonl; did you mean 'train.jsonl'"):
        read_source(SourceSettings("s", path="trian.jsonl"), tmp_path)
    with pytest.raises(DataError, match="relative to the config file's folder"):
        read_source(SourceSettings("s", path="no/where.jsonl"), tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.txt", b"x", r"d.txt: unknown file format; known are .jsonl"),
        ("d.jsonl", b"", "d.jsonl: the file is empty, there are no rows in it"),
        ("d.jsonl.gz", gzip.compress(b"", mtime=0), "d.jsonl.gz: the file is empty"),
        ("d.csv", b"a,b\n", "d.csv: the file is empty, there are no rows"),
        ("d.csv", b"\xff\xfe\xfa", "d.csv: cannot be read as UTF-8 text"),
        ("d.jsonl", b"{not json\n", "d.jsonl, line 1: cannot be read as JSON"),
        ("d.parquet", b"PAR0", "d.parquet: cannot be read"),
        ("d.csv.gz", b"not gzip", "d.csv.gz: cannot be read"),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"source 's', {message}"):
        read_source(SourceSettings("s", path=name), tmp_path)
