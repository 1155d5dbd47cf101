"""Flower's simulation equals the in-process run, also if clients are parts of a source."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedamole.config import load_config, load_run_config
from fedamole.deployment.flower.simulation import prepare_simulation
from fedamole.deployment.server_run import coordinate
from fedamole.errors import BaseModelError
from fedamole.experiment import settled, start
from fedamole.federation.progress import ProgressListener
from fedamole.runs.run_folder import RunFolder
from tests.conftest import small
from tests.deployment.test_moved_base import EmptyLink, ProcessEndedError
from tests.deployment.test_remote import facts, left, states

pytest.importorskip("ray", reason="Ray is the extra `ray`")

FEDAMOLE = Path(sys.executable).parent / "fedamole"


def test_equals_the_run_in_one_process(tiny: Path, tmp_path: Path) -> None:
    text = (
        (tiny / "config.toml")
        .read_text()
        .replace('path = "entail.jsonl"', 'path = "entail.jsonl"\npartition = { kind = "iid", clients = 2 }')
    )
    (tiny / "split.toml").write_text(text)
    overrides = [*small("fedamole"), "federation.rounds=3", "training.local_steps=1", "run.group=1"]
    in_process, there = tmp_path / "here", tmp_path / "there"
    start(settled(load_config(tiny / "split.toml", overrides), deployed=True), in_process, ProgressListener())
    done = subprocess.run(
        [FEDAMOLE, "simulate", tiny / "split.toml", *overrides, f"run.folder={there}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert states(there) == states(in_process)
    assert facts(there) == facts(in_process)
    names = sorted(path.name for path in (in_process / "clients").iterdir())
    assert names == ["chat", "entail-00", "entail-01", "mood", "plain"]
    for name in names:
        assert left(there / "server" / "sites" / f"fedamole-{name}" / "clients" / name) == left(
            in_process / "clients" / name
        )
    rows = [json.loads((path / "summary.json").read_text())["rows"] for path in (there, in_process)]
    assert rows[0] == rows[1]


def test_a_run_whose_base_moved_is_resumed_on_it(tiny: Path, tmp_path: Path) -> None:
    """The new location of the base is recorded in all run folders; the settings that clients are sent stay the same."""
    first, moved, folder = tmp_path / "first", tmp_path / "moved", tmp_path / "run"
    shutil.copytree(tiny / "base", first)
    overrides = [*small("fedit"), "federation.rounds=1", "training.local_steps=1", f"base.model={first}"]
    prepare_simulation(load_config(tiny / "config.toml", overrides), folder)
    with pytest.raises(ProcessEndedError):
        coordinate(EmptyLink(), folder)
    first.rename(moved)
    with pytest.raises(BaseModelError, match=rf"{first}, the base of {folder}, is not here: name a copy of it by --ba"):
        coordinate(EmptyLink(), folder)
    config = (folder / "config.toml").read_bytes()
    done = subprocess.run(
        [FEDAMOLE, "simulate", "--resume", folder, "--base", "./moved"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (folder / "config.toml").read_bytes() == config
    progress = map(json.loads, (folder / "server" / "progress.jsonl").read_text().splitlines())
    assert len({line["hash"] for line in progress if line["what"] == "agreed"}) == 1
    sites = [*(folder / "server" / "sites").glob("*/run.json")]
    assert sites
    for path in (folder, *(site.parent for site in sites)):
        assert load_run_config(RunFolder.open(path)).base.model == str(moved)


def test_a_config_without_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.toml").write_text('[deployment]\nclients = ["a", "b"]\n')
    done = subprocess.run([FEDAMOLE, "simulate", "d.toml"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "it defines the clients of a simulation" in done.stderr
    assert not (tmp_path / "runs").exists()
