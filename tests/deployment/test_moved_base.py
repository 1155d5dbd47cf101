"""A coordinator's run whose base was moved: it is resumed with the new location in --base."""

import json
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import pytest

from fedamole.config import load_config, load_run_config
from fedamole.deployment.flower.simulation import prepare_simulation
from fedamole.deployment.server_processes import move_base
from fedamole.deployment.server_run import coordinate
from fedamole.errors import BaseModelError, RunError
from fedamole.runs.run_folder import RunFolder
from tests.conftest import small

FEDAMOLE = Path(sys.executable).parent / "fedamole"


class ProcessEndedError(Exception):
    """The process of a run ended."""


class EmptyLink:
    """A link without clients: the run starts, and its process ends."""

    def nodes(self) -> dict[int, str]:
        raise ProcessEndedError

    def send(self, node: int, payload: bytes, round_: int, seconds: float) -> str:
        raise AssertionError

    def receive(self, tickets: Collection[str]) -> dict[str, bytes | str]:
        raise AssertionError


@pytest.fixture
def started(tiny: Path, tmp_path: Path) -> Path:
    """A run that started on the base in tmp_path/first, and whose process ended."""
    shutil.copytree(tiny / "base", tmp_path / "first")
    overrides = [*small("fedit"), "federation.rounds=1", f"base.model={tmp_path / 'first'}"]
    prepare_simulation(load_config(tiny / "config.toml", overrides), tmp_path / "run")
    with pytest.raises(RunError, match=r"has not started yet; start a new run with base\.model=x"):
        move_base(tmp_path / "run", "x")
    with pytest.raises(ProcessEndedError):
        coordinate(EmptyLink(), tmp_path / "run")
    return tmp_path / "run"


def test_a_run_continues_with_its_base_at_a_new_location(started: Path, tmp_path: Path) -> None:
    """The settings that clients are sent stay the same, and so does config.toml."""
    first, moved = tmp_path / "first", tmp_path / "moved"
    config = (started / "config.toml").read_bytes()
    first.rename(moved)
    with pytest.raises(
        BaseModelError, match=rf"{first}, the base of {started}, is not here: name a copy of it by --ba"
    ):
        coordinate(EmptyLink(), started)
    move_base(started, str(moved))
    with pytest.raises(ProcessEndedError):
        coordinate(EmptyLink(), started)
    progress = map(json.loads, (started / "server" / "progress.jsonl").read_text().splitlines())
    hashes = [line["hash"] for line in progress if line["what"] == "agreed"]
    assert len(hashes) == 2
    assert hashes[0] == hashes[1]
    assert load_run_config(RunFolder.open(started)).base.model == str(moved)
    assert (started / "config.toml").read_bytes() == config


def test_another_base_is_refused(started: Path) -> None:
    with pytest.raises(BaseModelError, match=f"the run in {started} was made on another base"):
        move_base(started, "bundled")
    about = RunFolder.open(started).about
    assert "base_model" not in about
    about["base"]["weights"] = "0"
    (started / "run.json").write_text(json.dumps(about))
    with pytest.raises(BaseModelError, match=f"the run in {started} was made on another base: .* by --base"):
        coordinate(EmptyLink(), started)


def test_the_base_of_an_active_run_is_not_changed(started: Path, tmp_path: Path) -> None:
    with RunFolder.open(started).locked(), pytest.raises(RunError, match="another process is running this run"):
        move_base(started, str(tmp_path / "first"))


@pytest.mark.parametrize("command", ["server", "simulate"])
def test_base_needs_resume(command: str, tiny: Path, tmp_path: Path) -> None:
    arguments: list[str | Path] = [FEDAMOLE, command, tiny / "config.toml", "--base", "x"]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "--base needs --resume; for a new run set base.model=x" in done.stderr


def test_a_server_takes_the_base_of_a_run_that_it_resumes(started: Path, tmp_path: Path) -> None:
    arguments: list[str | Path] = [
        FEDAMOLE,
        "server",
        "--resume",
        started,
        "--insecure",
        "--base",
        tmp_path / "nowhere",
    ]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 4
    assert f"there is no folder {tmp_path / 'nowhere'}" in done.stderr
