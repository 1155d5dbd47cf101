"""Public prompts: how rows become prompts, what is refused, and that no client ever has them."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedamole.comparison.trials import Trial
from fedamole.config import load_config
from fedamole.data.manifest import Manifest, TableRecord, load_federation
from fedamole.data.public import check_unchanged, load_public
from fedamole.data.settings import DataSettings, PublicSettings
from fedamole.data.templates import TemplateSettings
from fedamole.deployment.server_processes import prepare_folder
from fedamole.deployment.shared_config import own_tables, shared_tables
from fedamole.errors import ConfigError, DataError, RunError
from fedamole.experiment import plan_without_data, prepare, reads_outside, resume
from fedamole.federation.progress import ProgressListener
from fedamole.runs.identity import Identity

URGENT = TemplateSettings("{text}\n", "{label}", options=("low", "high"))


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny / "base")


@pytest.fixture
def read(tmp_path: Path, tokenizer: Any) -> Any:
    """`read(rows, **settings)`: the prompts and answers of public rows, as text."""

    def load(rows: list[dict[str, Any]], max_length: int = 96, **settings: Any) -> list[tuple[str, str]]:
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = DataSettings(public=PublicSettings("p.jsonl", **settings), templates={"urgent": URGENT})
        result = load_public(data, tmp_path, tokenizer, max_length).rows
        return [(tokenizer.decode(row.prompt), tokenizer.decode(row.answer)) for row in result]

    return load


@pytest.mark.parametrize(
    ("row", "settings", "prompt"),
    [
        ({"prompt": "Hello\n"}, {}, "Hello\n"),
        ({"instruction": "Sum up."}, {}, "### Instruction:\nSum up.\n\n### Response:\n"),
        ({"instruction": "Sum up.", "context": "A hat."}, {}, "### Input:\nA hat.\n\n### Response:\n"),
        ({"text": "A hat."}, {}, "Text: A hat.\nWhich class does the text belong to?\nClass:\n"),
        ({"premise": "A.", "hypothesis": "B."}, {}, "Premise: A.\nHypothesis: B.\n"),
        ({"text": "A hat."}, {"template": "urgent"}, "A hat.\n"),
        ({"prompt": "A hat?"}, {"template": "preference"}, "A hat?"),
        ({"question": "A hat?"}, {"columns": {"prompt": "question"}, "template": "plain"}, "A hat?"),
    ],
)
def test_a_row_may_be_a_prompt_alone(row: dict[str, Any], settings: Any, prompt: str, read: Any) -> None:
    (result,) = read([row], 300, **settings)
    assert prompt in result[0]
    assert result[1] == ""


def test_rows_may_have_answers_and_some_may_lack_them(read: Any) -> None:
    rows = [{"prompt": "A\n", "completion": "b"}, {"prompt": "C\n", "completion": None}]
    assert read(rows) == [("A\n", "b<end>"), ("C\n", "")]
    assert read([{"text": "A", "label": "high"}], template="urgent") == [("A\n", "high<end>")]


def test_a_prompt_alone_has_the_options_of_its_template(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "p.jsonl").write_text('{"text": "A hat."}\n')
    data = DataSettings(public=PublicSettings("p.jsonl", template="urgent"), templates={"urgent": URGENT})
    (row,) = load_public(data, tmp_path, tokenizer, 96).rows
    assert [tokenizer.decode(option) for option in row.options] == ["low<end>", "high<end>"]


def test_the_limit_draws_rows_by_the_partitions_seed(read: Any, tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": f"{i}\n"} for i in range(40)]
    few = read(rows, limit=5)
    assert len(few) == 5
    assert few == read(rows, limit=5)
    assert few != read(rows)[:5]
    seeded = DataSettings(public=PublicSettings("p.jsonl", limit=5), partition_seed=1)
    assert [tokenizer.decode(row.prompt) for row in load_public(seeded, tmp_path, tokenizer, 96).rows] != [
        prompt for prompt, _ in few
    ]


def test_long_prompts_are_cut_with_a_warning(read: Any, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        (result,) = read([{"prompt": "day " * 50}], 10)
    assert 0 < len(result[0]) < 100
    assert "data.public: 1 prompts cut to fit training.max_length = 10" in caplog.text


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({}, "data.public: set either path = <file> or hub = <data set id>, not both"),
        ({"path": "a", "hub": "b"}, "data.public: set either path"),
        ({"hub": "b"}, "data.public.split is missing"),
        ({"path": "a", "split": "train"}, "data.public.split = 'train': not used with path; remove this key"),
        ({"path": "a", "limit": 0}, "data.public.limit = 0: must be at least 1"),
        ({"path": "a", "template": "plane"}, "data.public.template = 'plane': unknown template"),
        ({"path": "a", "partition": {}}, "unknown key data.public.partition"),
        ({"path": 3}, "data.public.path = 3: must be text in quotes"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], error: str, tiny: Path) -> None:
    table = ", ".join(f"{key} = {json.dumps(value)}" for key, value in settings.items())
    with pytest.raises(ConfigError) as caught:
        load_config(tiny / "without-public.toml", [f"data.public={{{table}}}"])
    assert error in str(caught.value)


@pytest.fixture(scope="module", autouse=True)
def without_public(tiny: Path) -> Path:
    """The tiny federation's config without [data.public]."""
    text = (tiny / "config.toml").read_text()
    path = tiny / "without-public.toml"
    path.write_text(text.replace('[data.public]\npath = "public.jsonl"\n', ""))
    return path


@pytest.mark.parametrize(
    ("rows", "settings", "error"),
    [
        (None, {}, "source 'data.public': there is no file"),
        ([], {}, "the file is empty"),
        ([{"a": "b"}], {}, "no template fits the columns"),
        ([{"prompt": None}], {}, "row 1: column 'prompt' is empty"),
        ([{"text": "A", "label": "medium"}], {"template": "urgent"}, "row 1: the label 'medium' is outside"),
        ([{"b": "A"}], {"template": "urgent"}, "there is no column 'text'"),
    ],
)
def test_rows_that_are_refused(rows: Any, settings: Any, error: str, tmp_path: Path, tokenizer: Any) -> None:
    if rows is not None:
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSettings(public=PublicSettings("p.jsonl", **settings), templates={"urgent": URGENT})
    with pytest.raises(DataError) as caught:
        load_public(data, tmp_path, tokenizer, 96)
    assert error in str(caught.value)


# --- in a run -------------------------------------------------------------------------------------------------


def test_a_method_that_needs_them_says_so(without_public: Path, tmp_path: Path) -> None:
    """In a run, in a plan without data, and at a coordinator; other methods need none."""
    error = r"method.name = 'pfedhr': its server needs public prompts; add \[data.public\] with path"
    config = load_config(without_public, ["method.name=pfedhr", "run.device=cpu"])
    for refuses in (prepare, plan_without_data):
        with pytest.raises(ConfigError, match=error):
            refuses(config)
    deployed = replace(config, deployment=replace(config.deployment, clients=("entail", "mood")))
    with pytest.raises(ConfigError, match=error):
        prepare_folder(deployed, tmp_path / "server")
    assert prepare(load_config(without_public, ["method.name=fedit", "run.device=cpu"])).public == ()


def test_other_methods_do_not_read_them(tiny: Path) -> None:
    overrides = ["run.device=cpu", "data.public.path=nowhere.jsonl"]
    assert prepare(load_config(tiny / "config.toml", ["method.name=fedit", *overrides])).public == ()
    with pytest.raises(DataError, match="there is no file"):
        prepare(load_config(tiny / "config.toml", ["method.name=pfedhr", *overrides]))


@pytest.mark.parametrize(("method", "refused"), [("local_only", False), ("pfedhr", True)])
def test_a_stored_trial_may_have_other_prompts_if_its_method_reads_none(
    method: str, refused: bool, runs: Any, tmp_path: Path
) -> None:
    (tmp_path / "other.jsonl").write_text('{"prompt": "A hat."}\n' * 4)
    config = runs.load(method, f"data.public.path={tmp_path}/other.jsonl")
    trial = Trial(method, runs(method), "tiny", 0, {method: method}, config)
    if not refused:
        trial.refuse_other_config("the comparison")
        return
    with pytest.raises(RunError, match=r"has data.public.path = .*, but the comparison now has .*other.jsonl"):
        trial.refuse_other_config("the comparison")


def test_no_client_has_a_public_row(tiny: Path, without_public: Path) -> None:
    """Examples and splits are the same with and without public prompts, also where these are a client's own file."""
    alone = load_federation(load_config(without_public).data, Path.cwd())
    for path in (tiny / "public.jsonl", tiny / "plain.jsonl"):
        data = load_config(without_public, [f'data.public={{path = "{path}"}}']).data
        beside = load_federation(data, Path.cwd())
        assert beside.shards == alone.shards
        assert beside.manifest == alone.manifest
    prepared = prepare(load_config(tiny / "config.toml", ["method.name=pfedhr", "run.device=cpu"]))
    assert len(prepared.public) == 15
    assert set(prepared.clients) == {"entail", "mood", "chat", "plain"}
    prompts = {row.prompt for row in prepared.public}
    for client in prepared.clients.values():
        for split in (client.train, client.embedding, client.validation, client.test):
            assert not prompts & {row.prompt for row in split.rows}


def test_only_the_coordinator_knows_where_they_are(tiny: Path) -> None:
    config = load_config(tiny / "config.toml", ["method.name=pfedhr"])
    shared = shared_tables(config, Identity("a", "b", "c"))
    assert "public" not in shared["config"]["data"]
    assert "public.jsonl" not in json.dumps(shared)
    source = {"name": "mood", "path": "mood.jsonl"}
    assert "public" not in own_tables(shared, source, {}, "bundled")["data"]
    shared["config"]["data"]["public"] = {"path": "/etc/passwd"}
    with pytest.raises(ConfigError, match=r"the server sets data.public, which every client sets for itself"):
        own_tables(shared, source, {}, "bundled")


def test_commands_that_read_them_name_them(tiny: Path, tmp_path: Path) -> None:
    for method, named in (("pfedhr", True), ("fedit", False)):
        outside = reads_outside(load_config(tiny / "config.toml", [f"method.name={method}"]), tmp_path)
        assert any(text.endswith("public.jsonl") for text in outside) == named


def test_a_run_is_not_resumed_with_other_prompts(runs: Any, crash: Any, tiny: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text((tiny / "public.jsonl").read_text())
    folder = crash("round_done", 1, "pfedhr", f"data.public.path={own}")
    record = Manifest.from_json((folder / "manifest.json").read_text(), "m").public
    assert record is not None
    assert (record.name, record.rows) == ("own.jsonl", 15)
    own.write_text((tiny / "public.jsonl").read_text() + '{"prompt": "One more."}\n')
    with pytest.raises(DataError, match=r"data.public: own.jsonl is not what the run was started with: 16 rows"):
        resume(folder, ProgressListener())


def test_a_manifest_keeps_the_record(tmp_path: Path) -> None:
    record = TableRecord("p.jsonl", 3, "ab")
    manifest = Manifest(0, {}, (), (), record)
    assert Manifest.from_json(manifest.to_json(), "m") == manifest
    check_unchanged(record, replace(record, name="moved.jsonl"))
    with pytest.raises(DataError, match="restore the file, or start a new run"):
        check_unchanged(record, replace(record, sha256="cd"))
