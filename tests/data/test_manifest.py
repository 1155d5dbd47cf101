import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedamole.data import manifest as module
from fedamole.data.manifest import Manifest, load_federation
from fedamole.data.settings import DataSettings, PartitionSettings, SourceSettings
from fedamole.data.templates import TemplateSettings
from fedamole.errors import ConfigError, DataError

Write = Callable[..., str]
ALPHA = SourceSettings(
    "alpha",
    path="alpha.jsonl.gz",
    test="alpha.test.jsonl.gz",
    partition=PartitionSettings("dirichlet", by="label", alpha=1.0, clients=3),
)
BETA = SourceSettings("beta", path="beta.jsonl", partition=PartitionSettings("iid", clients=2))
SETTINGS = DataSettings((ALPHA, BETA))


def labelled(count: int, word: str) -> list[dict[str, Any]]:
    return [{"text": f"{word} {index}", "label": "xyz"[index % 3]} for index in range(count)]


def rows_of_text(count: int) -> list[dict[str, Any]]:
    return [{"instruction": f"ask {i}", "context": "", "response": f"say {i}"} for i in range(count)]


@pytest.fixture
def folder(write: Write, tmp_path: Path) -> Path:
    write("alpha.jsonl.gz", labelled(150, "train"))
    write("alpha.test.jsonl.gz", labelled(30, "test"))
    write("beta.jsonl", rows_of_text(60))
    return tmp_path


def test_clients_of_all_sources_in_the_configs_order(folder: Path) -> None:
    federation = load_federation(SETTINGS, folder)
    names = [shard.client for shard in federation.shards]
    assert names == ["alpha-00", "alpha-01", "alpha-02", "beta-00", "beta-01"]
    assert [shard.task for shard in federation.shards] == ["classification"] * 3 + ["generation"] * 2
    assert all(example.before.startswith("Text: test") for example in federation.shards[0].test)
    assert sum(len(shard.test) for shard in federation.shards[:3]) == 30


def test_the_same_seed_gives_the_same_federation_and_another_another(folder: Path) -> None:
    assert load_federation(SETTINGS, folder) == load_federation(SETTINGS, folder)
    other = load_federation(replace(SETTINGS, partition_seed=1), folder)
    assert other.shards != load_federation(SETTINGS, folder).shards


def test_another_source_changes_nothing_for_this_one(folder: Path) -> None:
    alone = load_federation(DataSettings((BETA,)), folder)
    assert alone.shards == load_federation(SETTINGS, folder).shards[3:]


def test_a_manifest_gives_the_federation_again_without_drawing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = load_federation(SETTINGS, folder)
    stored = Manifest.from_json(drawn.manifest.to_json(), "m.json")
    assert stored == drawn.manifest

    def refuse(*_: object) -> None:
        raise AssertionError("something was drawn")

    monkeypatch.setattr(module, "draw_clients", refuse)
    monkeypatch.setattr("numpy.random.default_rng", refuse)
    again = load_federation(SETTINGS, folder, stored)
    assert again.shards == drawn.shards
    assert again.notes == ()


def test_the_manifest_of_the_settings_is_used_and_what_it_overrides_is_noted(folder: Path) -> None:
    drawn = load_federation(SETTINGS, folder)
    (folder / "m.json").write_text(drawn.manifest.to_json())
    again = load_federation(replace(SETTINGS, manifest="m.json", partition_seed=5), folder)
    assert again.shards == drawn.shards
    assert again.notes == ("data.partition_seed = 5 in the config has no effect: the manifest was drawn with 0",)


def test_a_manifest_holds_no_path(folder: Path) -> None:
    text = load_federation(SETTINGS, folder).manifest.to_json()
    assert str(folder) not in text
    assert json.loads(text)["format"] == 1


def test_changed_data_are_noticed_by_source_and_file(folder: Path, write: Write) -> None:
    stored = load_federation(SETTINGS, folder).manifest
    write("alpha.test.jsonl.gz", labelled(31, "test"))
    with pytest.raises(DataError, match=r"source 'alpha': alpha.test.jsonl.gz is not what .* from: 31 rows") as error:
        load_federation(SETTINGS, folder, stored)
    assert "If the file is unchanged, an earlier version read its numbers or dates" in str(error.value)


def test_an_edited_manifest_is_noticed_by_client_and_split(folder: Path) -> None:
    content = json.loads(load_federation(SETTINGS, folder).manifest.to_json())
    split = content["clients"][1]["validation"]
    split["rows"][0] = content["clients"][0]["train"]["rows"][0]
    with pytest.raises(DataError, match="client 'alpha-01', split 'validation': the hash"):
        load_federation(SETTINGS, folder, Manifest.from_json(json.dumps(content), "m"))
    split["rows"][0] = 150
    with pytest.raises(DataError, match="split 'validation' has row 150, the table has rows 0 to 149"):
        load_federation(SETTINGS, folder, Manifest.from_json(json.dumps(content), "m"))


def test_another_template_is_noticed(folder: Path) -> None:
    stored = load_federation(DataSettings((BETA,)), folder).manifest
    columns = {"prompt": "instruction", "completion": "response"}
    other = DataSettings((replace(BETA, template="plain", columns=columns),))
    with pytest.raises(
        DataError, match=r"client 'beta-00', split 'train': .* the template, its options or label_noise changed"
    ):
        load_federation(other, folder, stored)


def test_a_manifest_of_other_sources_is_refused(folder: Path) -> None:
    stored = load_federation(SETTINGS, folder).manifest
    with pytest.raises(DataError, match=r"has the sources \['alpha', 'beta'\], the config has \['beta'\]"):
        load_federation(DataSettings((BETA,)), folder, stored)
    without = DataSettings((replace(ALPHA, test=None), BETA))
    with pytest.raises(DataError, match="source 'alpha': only the manifest has an official test"):
        load_federation(without, folder, stored)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"format": 2}', '{"format": 1, "partition_seed": 0, "settings": {}, "sources": [1]}'],
)
def test_a_corrupt_manifest_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"runs/m.json is (not valid|damaged|no usable)"):
        Manifest.from_json(text, "runs/m.json")


def test_a_truncated_or_missing_manifest_file_is_refused(folder: Path) -> None:
    text = load_federation(SETTINGS, folder).manifest.to_json()
    (folder / "m.json").write_text(text[: len(text) // 2])
    with pytest.raises(DataError, match=r"m.json is not valid"):
        load_federation(replace(SETTINGS, manifest="m.json"), folder)
    with pytest.raises(DataError, match=r"none.json cannot be read"):
        load_federation(replace(SETTINGS, manifest="none.json"), folder)


def test_two_sources_whose_clients_share_a_name_are_refused(folder: Path) -> None:
    twin = SourceSettings("beta-00", path="beta.jsonl")
    with pytest.raises(ConfigError, match="client 'beta-00' is in source 'beta' and in source 'beta-00'"):
        load_federation(DataSettings((BETA, twin)), folder)


CLINICS = ["北京市朝阳区医院", "北京市海淀区医院", "site-3"]
BY_CLINIC = DataSettings((SourceSettings("c", path="c.jsonl", partition=PartitionSettings("value", by="clinic")),))


def test_a_manifest_keeps_the_values_that_names_do_not_hold(write: Write, tmp_path: Path) -> None:
    write("c.jsonl", [{**row, "clinic": CLINICS[index % 3]} for index, row in enumerate(rows_of_text(90))])
    drawn = load_federation(BY_CLINIC, tmp_path)
    assert drawn.manifest.values() == {"c--4ab55f75229f": CLINICS[0], "c--6978bcde3af4": CLINICS[1]}
    stored = Manifest.from_json(drawn.manifest.to_json(), "m")
    assert stored == drawn.manifest
    assert load_federation(BY_CLINIC, tmp_path, stored).shards == drawn.shards
    records = {client["client"]: client for client in json.loads(drawn.manifest.to_json())["clients"]}
    assert "value" not in records["c-site-3"], "manifests of other partitions are what they were"
    only = stored.only("c--4ab55f75229f")
    assert Manifest.from_json(only.to_json(), "m").values() == {"c--4ab55f75229f": CLINICS[0]}


def test_a_long_value_is_kept_in_part(write: Write, tmp_path: Path) -> None:
    long = ["医" * 5000, "医" * 5001]
    write("c.jsonl", [{**row, "clinic": long[index % 2]} for index, row in enumerate(rows_of_text(60))])
    manifest = load_federation(BY_CLINIC, tmp_path).manifest
    assert list(manifest.values().values()) == ["医" * 200] * 2
    assert len(set(manifest.values())) == 2
    assert Manifest.from_json(manifest.to_json(), "m") == manifest


def test_options_that_differ_between_sources_of_one_task_are_noted(
    write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def drawn(*labels: str, template: str = "auto", **more: Any) -> tuple[str, ...]:
        caplog.clear()
        for name, source_labels in zip("ab", labels, strict=True):
            rows = [
                {"text": f"{name} {i}", "label": source_labels.split()[i % len(source_labels.split())]}
                for i in range(60)
            ]
            write(f"{name}.jsonl", rows)
        sources = tuple(SourceSettings(name, path=f"{name}.jsonl", template=template) for name in "ab")
        notes = load_federation(DataSettings(sources, **more), tmp_path).notes
        assert [record.getMessage() for record in caplog.records] == list(notes)
        return notes

    (note,) = drawn("yes no", "yes no maybe")
    assert note.startswith(
        "sources 'a' and 'b' have the same template and share options, but only one of them has the option 'maybe'"
    )
    assert drawn("yes no", "no yes") == ()
    assert drawn("yes no", "red blue") == (), "these are two tasks"
    task = TemplateSettings(prompt="{text}\n", answer="{label}", options=("maybe", "no", "yes"))
    assert drawn("yes no", "no", template="task", templates={"task": task}) == (), "a single label, listed options"
