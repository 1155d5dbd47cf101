"""A coordinator's run whose base lies elsewhere now: it is resumed on a copy that --base names."""

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


class GoneError(Exception):
    """The process of a run has ended."""


class Nobody:
    """A link on which nobody ever is: the run begins, and its process ends."""

    def nodes(self) -> dict[int, str]:
        raise GoneError

    def send(self, node: int, payload: bytes, round_: int, seconds: float) -> str:
        raise AssertionError

    def receive(self, tickets: Collection[str]) -> dict[str, bytes | str]:
        raise AssertionError


@pytest.fixture
def begun(tiny: Path, tmp_path: Path) -> Path:
    """A run that has begun, on the base in tmp_path/first, and whose process has ended."""
    shutil.copytree(tiny / "base", tmp_path / "first")
    words = [*small("fedit"), "federation.rounds=1", f"base.model={tmp_path / 'first'}"]
    prepare_simulation(load_config(tiny / "config.toml", words), tmp_path / "run")
    with pytest.raises(RunError, match=r"has not begun yet; start it anew with base\.model=x"):
        move_base(tmp_path / "run", "x")
    with pytest.raises(GoneError):
        coordinate(Nobody(), tmp_path / "run")
    return tmp_path / "run"


def test_a_run_goes_on_with_the_base_at_its_new_place(begun: Path, tmp_path: Path) -> None:
    """What clients are told of the run's settings stays the same, and so does config.toml."""
    first, moved = tmp_path / "first", tmp_path / "moved"
    config = (begun / "config.toml").read_bytes()
    first.rename(moved)
    with pytest.raises(BaseModelError, match=rf"{first}, the base of {begun}, is not here: name a copy of it by --ba"):
        coordinate(Nobody(), begun)
    move_base(begun, str(moved))
    with pytest.raises(GoneError):
        coordinate(Nobody(), begun)
    progress = map(json.loads, (begun / "server" / "progress.jsonl").read_text().splitlines())
    hashes = [line["hash"] for line in progress if line["what"] == "agreed"]
    assert len(hashes) == 2
    assert hashes[0] == hashes[1]
    assert load_run_config(RunFolder.open(begun)).base.model == str(moved)
    assert (begun / "config.toml").read_bytes() == config


def test_another_base_is_refused(begun: Path) -> None:
    with pytest.raises(BaseModelError, match=f"the run in {begun} was made on another base"):
        move_base(begun, "bundled")
    about = RunFolder.open(begun).about
    assert "base_model" not in about
    about["base"]["weights"] = "0"
    (begun / "run.json").write_text(json.dumps(about))
    with pytest.raises(BaseModelError, match=f"the run in {begun} was made on another base: .* by --base"):
        coordinate(Nobody(), begun)


def test_a_run_that_is_under_way_keeps_its_base(begun: Path, tmp_path: Path) -> None:
    with RunFolder.open(begun).locked(), pytest.raises(RunError, match="another process is running this run"):
        move_base(begun, str(tmp_path / "first"))


@pytest.mark.parametrize("command", ["server", "simulate"])
def test_base_goes_with_resume(command: str, tiny: Path, tmp_path: Path) -> None:
    words: list[str | Path] = [FEDAMOLE, command, tiny / "config.toml", "--base", "x"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "--base goes with --resume; a new run takes base.model=x" in done.stderr


def test_a_server_takes_the_base_of_a_run_that_it_resumes(begun: Path, tmp_path: Path) -> None:
    words: list[str | Path] = [FEDAMOLE, "server", "--resume", begun, "--insecure", "--base", tmp_path / "nowhere"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 4
    assert f"there is no folder {tmp_path / 'nowhere'}" in done.stderr
