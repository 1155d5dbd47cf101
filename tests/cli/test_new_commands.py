"""`fedamole init`, `config`, `runs`, and what the shell completes."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tests.conftest import call_command

from fedamole.cli.options import bundled_config
from fedamole.config import read_tables
from fedamole.config_schema import config_schema
from fedamole.methods import METHODS

ROWS = [{"prompt": f"Is {number} even?\n", "completion": ("yes", "no")[number % 2]} for number in range(40)]
ROOT = Path(__file__).parents[2]


def write(path: Path, rows: Any = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_init_writes_a_config_that_runs(tmp_path: Path) -> None:
    for name in ("north", "south", "east wind"):
        write(tmp_path / "data" / f"{name}.jsonl")
    write(tmp_path / "data" / "north.test.jsonl", [{"prompt": "Is 99 even?\n", "completion": "no"}])
    out = tmp_path / "my.toml"
    result = call_command("init", tmp_path / "data", "--out", out, "--method", "fedit")
    assert (result.code, result.out) == (0, f"{out}\n")
    tables = tomllib.loads(out.read_text())
    assert tables["method"]["name"] == "fedit"
    assert [(source["name"], source["path"], source.get("test")) for source in tables["data"]["source"]] == [
        ("east-wind", "data/east wind.jsonl", None),
        ("north", "data/north.jsonl", "data/north.test.jsonl"),
        ("south", "data/south.jsonl", None),
    ]
    assert out.read_text().count("\n# ") > 8
    folder = tmp_path / "run"
    settings = ("federation.rounds=1", "training.local_steps=1", f"run.folder={folder}", "run.threads=1")
    assert call_command("run", out, *settings).code == 0
    assert sorted(path.name for path in (folder / "clients").iterdir()) == ["east-wind", "north", "south"]


def test_init_with_one_file_divides_it(tmp_path: Path) -> None:
    out = tmp_path / "one.toml"
    assert call_command("init", write(tmp_path / "all.jsonl", ROWS * 4), "--out", out).code == 0
    (source,) = tomllib.loads(out.read_text())["data"]["source"]
    assert source == {"name": "all", "path": "all.jsonl", "partition": {"kind": "iid", "clients": 4}}
    assert call_command("partition", out).code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (("nowhere",), 3, "there is no file or folder nowhere"),
        (("empty",), 3, "empty has no data files; known are .jsonl"),
        (("notes.txt",), 3, "notes.txt: unknown file format"),
        (("odd.jsonl",), 3, "no template fits the columns a"),
        (("a/north.jsonl", "b/north.jsonl"), 3, "two of the files have the same name"),
        (("a/north.jsonl", "--method", "fedti"), 2, "did you mean 'fedit'?"),
        (("a/north.jsonl", "--out", "odd.jsonl"), 5, "exists"),
        (
            ("a/north.jsonl", "--out", "x\n[run]\nseed = 7\n#.toml"),
            2,
            r"--out: the name 'x\n[run]\nseed = 7\n#.toml' has",
        ),
        (
            ("c/north.test.jsonl",),
            3,
            "c/north.test.jsonl has the name of a test set, but there is no training file 'north'",
        ),
    ],
)
def test_mistakes_of_init_write_nothing(
    arguments: tuple[str, ...], code: int, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a/north.jsonl", "b/north.jsonl", "c/north.test.jsonl", "notes.txt"):
        write(tmp_path / name)
    write(tmp_path / "odd.jsonl", [{"a": 1}])
    (tmp_path / "empty").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    result = call_command("init", *arguments)
    assert error in result.error
    assert result.code in (code, 1)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_schema_accepts_the_configs_of_this_repository_and_refuses_mistakes() -> None:
    schema = config_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    bundled = [bundled_config(name) for name in ("fedamole", "fedit", "local_only", "fedamole_peers")]
    for path in [*bundled, *sorted((ROOT / "experiments/paper").glob("snli*.toml"))]:
        assert not list(validator.iter_errors(read_tables(path))), path
    for tables in (
        {"method": {"name": "fedti"}},
        {"method": {"name": "fedit", "experts": 3}},
        {"method": {"experts": "many"}},
        {"run": {"trackers": ["tensorbord"]}},
        {"training": {"learning_rte": 1.0}},
        {"data": {"source": [{"path": "x"}]}},
    ):
        assert list(validator.iter_errors(tables)), tables
    rounds = schema["properties"]["federation"]["properties"]["rounds"]
    assert (rounds["type"], rounds["default"]) == ("integer", 30)
    assert rounds["description"]
    assert len(schema["properties"]["method"]["allOf"]) == len(METHODS)


def test_config_prints_the_schema_and_a_resolved_config() -> None:
    assert json.loads(call_command("config", "--schema").out) == json.loads(json.dumps(config_schema()))
    tables = tomllib.loads(call_command("config", "method.name=fedit", "federation.rounds=5").out)
    assert (tables["method"]["name"], tables["method"]["rank"]) == ("fedit", 8)
    assert tables["federation"]["rounds"] == 5


def test_runs_are_listed(runs: Any, tmp_path: Path) -> None:
    shutil.copytree(runs("fedit"), tmp_path / "all" / "group" / "done")
    shutil.copytree(runs("local_only"), tmp_path / "all" / "stopped")
    (tmp_path / "all" / "stopped" / "summary.json").unlink()
    shutil.copytree(runs("local_only"), tmp_path / "all" / "broken")
    (tmp_path / "all" / "broken" / "run.json").write_text("{}")
    result = call_command("runs", tmp_path / "all", "--json")
    records = {Path(record["run"]).name: record for record in json.loads(result.out)}
    summary = json.loads((runs("fedit") / "summary.json").read_text())
    rounds = summary["rounds"]
    assert records["done"]["state"] == "finished"
    assert records["done"]["score"] == summary["rows"]["fedit"]["mean"]
    assert (records["done"]["method"], records["done"]["seed"]) == ("fedit", 0)
    assert records["done"]["started"].startswith("20")
    assert records["stopped"]["state"] == f"{rounds} of {rounds} rounds"
    assert records["stopped"]["score"] is None
    assert records["broken"]["state"] == "damaged"
    text = call_command("runs", tmp_path / "all").out
    assert "3 runs in" in text
    assert f"{records['done']['score']:.1f}" in text
    assert call_command("runs", tmp_path / "nothing").code == 5


def test_runs_are_listed_once_and_damaged_ones_last_with_the_reason(runs: Any, tmp_path: Path) -> None:
    folder = tmp_path / "all"
    for name, started in (("Town", "2026-01-02T03:04:00Z"), ("later", "2026-01-03T03:04:05Z"), ("odd", "zzz")):
        run = Path(shutil.copytree(runs("fedit"), folder / name)) / "run.json"
        run.write_text(json.dumps(json.loads(run.read_text()) | {"started": started}))
    shutil.copytree(runs("local_only"), folder / "two\nlines")
    (folder / "two\nlines" / "run.json").write_text("{}")
    (folder / "again").symlink_to("Town")
    (folder / "loop").symlink_to(folder)
    records = json.loads(call_command("runs", folder, "--json").out)
    assert [Path(record["run"]).name for record in records] == ["later", "Town", "odd", "two\nlines"]
    lines = call_command("runs", folder).out.splitlines()
    (row,) = [line for line in lines if "Town" in line]
    assert "2026-01-02 03:04 " in row
    assert [line for line in lines if line.endswith("restore it from a copy") or "is damaged: " in line] == [lines[-1]]
    assert lines[-1].startswith(rf"{folder}/two\nlines is damaged: ")
    assert "run.json" in lines[-1]


def completed(*words: str, cwd: Path) -> list[str]:
    """What the shell offers for the last word, asked as bash does."""
    environment = {
        **os.environ,
        "_FEDAMOLE_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(["fedamole", *words]),
        "COMP_CWORD": str(len(words)),
    }
    script = "import sys; sys.argv = ['fedamole']; from fedamole.cli.main import app; app(prog_name='fedamole')"
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=cwd, capture_output=True, text=True)
    return done.stdout.split()


def test_the_shell_completes_runs_clients_and_methods(runs: Any, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(runs("fedit"))
    (tmp_path / "runs" / "data").mkdir()
    assert completed("show", "runs/m", cwd=tmp_path) == ["runs/mine"]
    assert completed("generate", "ru", cwd=tmp_path) == ["runs/"]
    assert completed("generate", "runs/mine", "--client", "m", cwd=tmp_path) == ["mood"]
    assert completed("methods", "fedamole_p", cwd=tmp_path) == ["fedamole_peers", "fedamole_peers_ft"]


def test_a_run_says_at_once_what_it_does(tiny: Path, tmp_path: Path) -> None:
    result = call_command("run", tiny / "config.toml", "federation.rounds=1", f"run.folder={tmp_path / 'run'}")
    lines = [line for line in result.err.splitlines() if "it/s]" not in line]
    assert lines[0] == "loading PyTorch and the settings"
    assert lines[2] == "loading the data and the base"
