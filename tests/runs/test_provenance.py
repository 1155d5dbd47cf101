"""Date, command, versions and hardware of a run in run.json."""

import getpass
import json
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tests.conftest import call_command

import fedamole as fa
from fedamole.runs import provenance
from fedamole.runs.identity import Identity
from fedamole.runs.run_folder import RunFolder


def test_a_run_from_the_command_line(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "run"
    before = datetime.now(UTC).replace(microsecond=0)
    arguments = (tiny / "config.toml", "method.name=fedit", "federation.rounds=1", f"run.folder={folder}")
    assert call_command("run", *arguments).code == 0
    about = json.loads((folder / "run.json").read_text())
    (session,) = about["sessions"]
    assert session["command"] == "fedamole run .../config.toml method.name=fedit federation.rounds=1 run.folder=.../run"
    started = datetime.fromisoformat(about["started"])
    assert before <= started <= datetime.fromisoformat(session["started"]) <= datetime.now(UTC)
    assert 0 < session["seconds"] < 100
    assert about["versions"]["python"] == platform.python_version()
    assert {"torch", "transformers", "peft"} < set(about["versions"])
    assert set(about["hardware"]) == {"system", "machine", "cpus", "memory_gib", "gpus"}
    text = (folder / "run.json").read_text()
    assert not [secret for secret in (str(tmp_path), str(tiny), str(Path.home()), platform.node()) if secret in text]


def test_every_session_is_recorded(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "", "{}", "fedit", Identity("w", "t", "x"))
    with pytest.raises(KeyboardInterrupt), folder.session():
        raise KeyboardInterrupt
    folder = RunFolder.open(tmp_path / "run")
    with folder.session():
        pass
    commands = [session["command"] for session in RunFolder.open(tmp_path / "run").about["sessions"]]
    assert commands == ["python", "python"]


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["/home/ann/.venv/bin/fedamole", "run", "my.toml", "run.seed=1"], "fedamole run my.toml run.seed=1"),
        (["fedamole", "run", "/home/ann/a b/my.toml"], "fedamole run .../my.toml"),
        (["fedamole", "run", "~/x/my.toml", "~ann/y"], "fedamole run .../my.toml .../y"),
        (["fedamole", "run", "../../ann/my.toml", "configs/my.toml"], "fedamole run .../my.toml configs/my.toml"),
        (["fedamole", "run", "run.folder=/mnt/ann/run"], "fedamole run run.folder=.../run"),
        (["fedamole", "run", "base.model=org/base"], "fedamole run base.model=org/base"),
        (["fedamole", "run", r"C:\Users\ann\my.toml"], "fedamole run .../my.toml"),
        (
            ["fedamole", "run", 'data.source=[{name="a", path="/home/ann/a.jsonl"}, {path=\'/ann/b.csv\'}]'],
            'fedamole run data.source=[{name="a", path=".../a.jsonl"}, {path=\'.../b.csv\'}]',
        ),
        (["/x/fedamole/__main__.py", "demo"], "fedamole demo"),
        (["/home/ann/train.py", "--key", "secret"], "python"),
        (["-c"], "python"),
    ],
)
def test_commands_have_no_absolute_paths(words: list[str], shown: str) -> None:
    assert provenance.command(words) == shown


def test_credentials_in_urls_are_removed() -> None:
    shown = provenance.command(["fedamole", "server", "run.toml", "--proxy", "http://ann:pass@host:1"])
    assert "ann" not in shown
    assert "pass" not in shown


def test_the_commit_is_that_of_the_checkout_that_tracks_the_package(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert provenance._commit(package) == {}
    git("init", "-q")
    assert provenance._commit(package) == {}
    git("add", ".")
    git("commit", "-qm", "first")
    assert provenance._commit(package) == {"commit": git("rev-parse", "HEAD"), "modified": False}
    (package / "__init__.py").write_text("x = 1\n")
    assert provenance._commit(package) == {"commit": git("rev-parse", "HEAD"), "modified": True}


def test_a_run_from_python_names_no_user(tmp_path: Path) -> None:
    rows = [{"prompt": f"Is {number} even?\n", "completion": ("yes", "no")[number % 2]} for number in range(30)]
    settings = {
        "method": {"name": "local_only"},
        "federation": {"rounds": 1},
        "training": {"local_steps": 1},
        "run": {"device": "cpu", "threads": 1},
    }
    run = fa.run(settings, data={"north": rows}, folder=tmp_path / "run", progress="none")
    about = json.loads((run.path / "run.json").read_text())
    assert about["sessions"][0]["command"] == "python"
    assert f"/{getpass.getuser()}/" not in json.dumps(about)
