"""A run that was killed and resumed is the run that was never interrupted."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedamole import planning
from fedamole.config import load_config
from fedamole.errors import RunError
from fedamole.experiment import prepare, resume
from fedamole.federation.progress import ProgressListener

POINTS = {
    "before the first group": ("group_started", 1),
    "in training, round 0": ("step", 5),
    "in training, round 1": ("step", 17),  # 4 clients x 3 steps a round
    "a state of round 1 written": ("mood/state/round-0001.safetensors", 1),
    "all answered, not aggregated": ("client_done", 8),
    "before evaluation": ("stage", 3),
    "some best models of round 1 kept": ("mood/adapter", 2),
    "server state without its commit": ("checkpoints/round-0001.safetensors", 1),
    "committed, nothing after": ("checkpoints/round-0001.json", 1),
    "after the last round": ("round_done", 3),
    "in the final test": ("stage", 6),  # the base, three rounds, the method's test and now the base's
}
SOME = {
    "fedamole": ("in training, round 1", "a state of round 1 written", "committed, nothing after", "in the final test"),
    "fedit": (
        "all answered, not aggregated",
        "before evaluation",
        "some best models of round 1 kept",
        "server state without its commit",
        "after the last round",
    ),
    "local_only": (
        "before the first group",
        "in training, round 0",
        "a state of round 1 written",
        "some best models of round 1 kept",
        "committed, nothing after",
    ),
}
"""Every point once at least, each method where it has something of its own to lose."""


def test_every_point_is_used() -> None:
    assert {point for points in SOME.values() for point in points} == set(POINTS)


@pytest.mark.parametrize(("method", "point"), [(method, point) for method in SOME for point in SOME[method]])
def test_killed_and_resumed(method: str, point: str, runs: Any, crash: Any, remains: Callable[[Path], Any]) -> None:
    folder = crash(*POINTS[point], method)
    resume(folder, ProgressListener())
    assert remains(folder) == remains(runs(method))
    assert same_summary(folder, runs(method))


SPOILT = ("training.learning_rate=1.0", "federation.rounds=8", "federation.patience=2")
"""A rate that soon spoils what was learnt, so that the run stops early."""


@pytest.mark.parametrize("point", ["in the last round", "after the last round", "before the test", "in the test"])
def test_a_run_that_stops_early_is_killed_and_resumed(point: str, runs: Any, crash: Any, remains: Any) -> None:
    """It stops after the same round, whether the kill comes before or after that round is committed."""
    complete = json.loads((runs("local_only", *SPOILT) / "summary.json").read_text())
    done = complete["rounds"]
    assert 2 < done < 8, "choose another rate"
    points = {
        "in the last round": ("round_started", done),
        "after the last round": ("round_done", done),
        "before the test": ("stopped", 1),
        "in the test": ("stage", done + 3),  # the base, each round, the method's test, and then the base's
    }
    folder = crash(*points[point], "local_only", *SPOILT)
    resume(folder, ProgressListener())
    assert remains(folder) == remains(runs("local_only", *SPOILT))
    resumed = json.loads((folder / "summary.json").read_text())
    assert [resumed[key] for key in ("rounds", "stopped", "rows")] == [
        complete[key] for key in ("rounds", "stopped", "rows")
    ]


def same_summary(first: Path, other: Path) -> bool:
    results = [json.loads((folder / "summary.json").read_text()) for folder in (first, other)]
    return results[0]["rows"] == results[1]["rows"] and len(results[0]["rows"]) >= 3


def test_a_group_that_was_chosen_is_kept(runs: Any, crash: Any, remains: Any, monkeypatch: Any) -> None:
    """Started where four clients fit, resumed where memory is short: the same groups, and so the same bits."""
    monkeypatch.setattr(planning, "free_bytes", lambda _: 2**40)
    folder = crash("client_done", 6, "fedamole", "run.group=0")
    monkeypatch.setattr(planning, "free_bytes", lambda _: 0)
    assert prepare(runs.load("fedamole", "run.group=0")).config.run.group == 1
    resume(folder, ProgressListener())
    assert remains(folder) == remains(runs("fedamole", "run.group=4"))


def test_killed_twice_with_two_rows_and_a_partial_cohort(runs: Any, crash: Any, remains: Any) -> None:
    overrides = ("evaluation.pre_aggregation=true", "federation.cohort=0.5", "federation.rounds=4")
    folder = crash("client_done", 5, "fedit", *overrides)
    (folder / "metrics.jsonl").open("a").write('{"round": 2, "client": "mo')  # a line torn by the kill
    resume(folder, ProgressListener())
    assert remains(folder) == remains(runs("fedit", *overrides))


def test_a_killed_process(runs: Any, tmp_path: Path, remains: Any) -> None:
    """The command itself, killed from outside in the midst of round 1 and resumed by the command."""
    folder = tmp_path / "run"
    from_conftest = ["method.name=fedit", "run.name=fedit", "method.rank=2", "method.alpha=4"]
    command = [sys.executable, "-m", "fedamole", "run", str(runs.config), *from_conftest, f"run.folder={folder}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(folder.glob("clients/*/state/round-0001.safetensors")) and time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "summary.json").exists()
    done = subprocess.run(
        [sys.executable, "-m", "fedamole", "resume", str(folder), "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "fedit" in json.loads(done.stdout)[0]["columns"]
    assert remains(folder) == remains(runs("fedit"))


@pytest.mark.parametrize("damage", ["server", "client", "json"])
def test_a_torn_last_checkpoint(damage: str, runs: Any, crash: Any, remains: Any, caplog: Any) -> None:
    """Killed at the end of round 1 with its checkpoint torn: round 0 is the one to go on from."""
    folder = crash("group_started", 5, "fedamole")
    damaged = {
        "server": "checkpoints/round-0001.safetensors",
        "client": "clients/mood/state/round-0001.safetensors",
        "json": "checkpoints/round-0001.json",
    }[damage]
    os.truncate(folder / damaged, (folder / damaged).stat().st_size // 2)
    started: list[int] = []

    class Notes(ProgressListener):
        def round_started(self, round_: int, *_: Any) -> None:
            started.append(round_)

    resume(folder, Notes())
    assert started == [1, 2]
    assert "round-0001.json is damaged; going back to the round before it" in caplog.text
    assert remains(folder) == remains(runs("fedamole"))


def test_all_checkpoints_corrupt(crash: Any) -> None:
    folder = crash("group_started", 5, "fedit")
    for path in folder.glob("checkpoints/*.safetensors"):
        os.truncate(path, 10)
    with pytest.raises(RunError, match="no checkpoint is intact"):
        resume(folder, ProgressListener())


def test_a_foreign_checkpoint(runs: Any, crash: Any) -> None:
    folder = crash("group_started", 5, "fedit")
    other = runs("fedit")
    shutil.rmtree(folder / "checkpoints")
    shutil.rmtree(folder / "clients")
    shutil.copytree(other / "checkpoints", folder / "checkpoints")
    shutil.copytree(other / "clients", folder / "clients")
    with pytest.raises(RunError, match="belongs to another run"):
        resume(folder, ProgressListener())


def test_a_finished_run_is_not_changed(runs: Any) -> None:
    folder = runs("fedit")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert resume(folder, ProgressListener())["method"] == "fedit"
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_running_run_is_refused(crash: Any) -> None:
    from fedamole.runs.run_folder import RunFolder

    folder = crash("group_started", 3, "local_only")
    with RunFolder.open(folder).locked(), pytest.raises(RunError, match="another process is running this run"):
        resume(folder, ProgressListener())


def test_disk_stays_bounded(runs: Any) -> None:
    folder = runs("fedit", "federation.rounds=8", "federation.cohort=0.5", "training.local_steps=1")
    assert len(list(folder.glob("checkpoints/*"))) == 4  # two, a state and its json
    for client in folder.glob("clients/*"):
        assert 1 <= len(list(client.glob("state/*"))) <= 2
    assert not list(folder.rglob("*.writing"))


def test_the_config_of_a_run_is_what_it_is_resumed_from(runs: Any) -> None:
    """Every default is spelled out, so a later version of the package with other defaults changes nothing."""
    config = load_config(runs("fedamole") / "config.toml")
    assert config.method == runs.load("fedamole").method
    assert config.training == runs.load("fedamole").training
    assert config.run.folder == str(runs("fedamole"))
