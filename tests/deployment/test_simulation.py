"""Flower's simulation equals the in-process run, also if clients are parts of a source."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedamole.config import load_config
from fedamole.experiment import start
from fedamole.federation.progress import ProgressListener
from tests.conftest import small
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
    words = [*small("fedamole"), "federation.rounds=3", "training.local_steps=1", "run.group=1"]
    here, there = tmp_path / "here", tmp_path / "there"
    start(load_config(tiny / "split.toml", words), here, ProgressListener())
    done = subprocess.run(
        [FEDAMOLE, "simulate", tiny / "split.toml", *words, f"run.folder={there}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert states(there) == states(here)
    assert facts(there) == facts(here)
    names = sorted(path.name for path in (here / "clients").iterdir())
    assert names == ["chat", "entail-00", "entail-01", "mood", "plain"]
    for name in names:
        assert left(there / "server" / "sites" / f"fedamole-{name}" / "clients" / name) == left(here / "clients" / name)
    rows = [json.loads((path / "summary.json").read_text())["rows"] for path in (there, here)]
    assert rows[0] == rows[1]


def test_a_config_without_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.toml").write_text('[deployment]\nclients = ["a", "b"]\n')
    done = subprocess.run([FEDAMOLE, "simulate", "d.toml"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "it defines the clients of a simulation" in done.stderr
    assert not (tmp_path / "runs").exists()
