"""Clients of a partition by value: people read the value, in every script; folders and JSON have safe names."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.received import call

from fedamole.data.client_labels import LONGEST_LABEL, client_labels
from fedamole.personal.saved_models import find_model
from fedamole.received.names import joined_name

VALUES = ("北京 医院", "مستشفى", "Больница № 5", "north")


def named(*values: str, source: str = "site") -> list[dict[str, Any]]:
    names = [joined_name(source, value) for value in values]
    return [
        {"client": name, "source": source} | ({} if name == f"{source}-{value}" else {"value": value})
        for name, value in zip(names, values, strict=True)
    ]


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labels")
    rows = [
        {"text": f"day {index}: {value}", "label_text": "glad" if index % 3 else "sad", "place": value}
        for index in range(20)
        for value in VALUES
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.toml").write_text(
        f'[base]\nmodel = "{tiny / "base"}"\n[method]\nname = "fedit"\nrank = 2\n[federation]\nrounds = 1\n'
        "[training]\nlocal_steps = 1\nmax_length = 128\n[data]\nmin_examples = 1\n[[data.source]]\n"
        'name = "site"\npath = "rows.jsonl"\npartition = { kind = "value", by = "place" }\n'
    )
    result = call("run", folder / "run.toml", f"run.folder={folder / 'out'}")
    assert result.code == 0, result.err
    return folder / "out"


def test_people_read_values_and_machines_read_names(run: Path, tmp_path: Path) -> None:
    names = [joined_name("site", value) for value in VALUES]
    assert sorted(path.name for path in (run / "clients").iterdir()) == sorted(names)
    for arguments in (("show",), ("show", "--markdown")):
        output = call(arguments[0], run, *arguments[1:]).out
        for name, value in zip(names, VALUES, strict=True):
            assert f"site-{value}" in output
            assert (name in output) == (value == "north")
    (result,) = json.loads(call("show", run, "--json").out)
    assert sorted(result["columns"]["fedit"]["clients"]) == sorted(names)
    assert call("report", run, "--out", tmp_path / "page.html").code == 0
    page = (tmp_path / "page.html").read_text()
    for name, value in zip(names, VALUES, strict=True):
        assert f"site-{value}" in page or json.dumps(f"site-{value}")[1:-1] in page
        assert (name in page) == (value == "north")
        card = (run / "clients" / name / "adapter" / "README.md").read_text()
        assert f"# A personal model of site-{value}" in card
        assert f"`{name}`" in card


def test_a_client_is_named_by_its_folder_its_value_or_its_label(run: Path) -> None:
    for value in VALUES[:3]:
        for argument in (joined_name("site", value), value, f"site-{value}"):
            assert find_model(run, argument).client == joined_name("site", value)


def test_a_comparison_shows_values_and_keeps_names_in_its_records(run: Path) -> None:
    from fedamole.comparison.records import as_csv, as_records
    from fedamole.comparison.tables import as_markdown, build_tables
    from fedamole.reporting.results import TrialResult, read_scenarios

    scenarios = read_scenarios([TrialResult("a", "fedit", "fedit", 0, run)])
    text, numbers = as_markdown(build_tables(scenarios, "fedit")), as_csv(as_records(scenarios, "fedit"))
    for value in VALUES[:3]:
        assert f"site-{value}" in text
        assert joined_name("site", value) not in text
        assert joined_name("site", value) in numbers


def test_labels_are_one_printable_short_line_each_of_one_client() -> None:
    odd = named("a\nb  c", "\x1b[31m\u202eevil", "x" * 5000, "a b c", "北")
    labels = client_labels(odd)
    assert set(labels.values()) == {
        "site-\\x1b[31m\\u202eevil",
        "site-北",
        "site-" + "x" * (LONGEST_LABEL - 9) + " ...",
    }
    assert client_labels(named("north", "b")) == {}
    assert client_labels(named("b-C", source="a") + named("C", source="a-b")) == {}, "two would be called alike"
    forged = [{"client": "clients", "source": "s", "value": "x"}]
    assert client_labels(forged) == {}, "a name without a hash could be any word of a page"
