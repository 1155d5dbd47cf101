"""The commands of the examples' scripts and texts work with the real command line."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from fedamole.config import load_config
from fedamole.data.manifest import load_federation
from fedamole.data.settings import DataSettings, SourceSettings
from fedamole.deployment.security.policy import (
    PolicyError,
    PolicySettings,
    enforce,
    read_policy,
    row_checks,
    settings_checks,
)
from fedamole.runs.run_files import SPLITS

ROOT = Path(__file__).parents[1]
HOSPITALS = ROOT / "examples" / "three_hospitals"
SCRIPT = HOSPITALS / "run.sh"
NAMES = ("cancer_centre", "eye_hospital", "genetics_clinic")
COLUMNS = {"genetics_clinic": {"instruction": "question", "response": "answer"}}


def test_every_example_is_found() -> None:
    """The notebook is executed by tests/api/test_notebook.py."""
    assert sorted(path.name for path in (ROOT / "examples").iterdir()) == ["notebook", "three_hospitals"]


def test_the_config_names_the_hospitals_of_the_script() -> None:
    config = load_config(HOSPITALS / "config.toml")
    assert config.deployment.clients == NAMES
    assert 'hospitals="' + " ".join(NAMES) + '"' in SCRIPT.read_text()
    config.method.check(len(NAMES))


@pytest.mark.parametrize("name", NAMES)
def test_a_hospitals_rows_become_examples(name: str) -> None:
    path = HOSPITALS / "data" / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert 60 <= len(rows) <= 100
    assert len({next(iter(row.values())) for row in rows}) == len(rows), "no question comes twice"
    source = SourceSettings(name, path=str(path), columns=COLUMNS.get(name, {}))
    (shard,) = load_federation(DataSettings(source=(source,)), ROOT).shards
    assert shard.client == name


@pytest.mark.parametrize("name", NAMES)
def test_a_hospitals_policy_allows_what_the_config_asks(name: str) -> None:
    """By the hospital's own rows, and for the method as organisations run it."""
    policy = read_policy(HOSPITALS / "policy.toml")
    config = load_config(HOSPITALS / "config.toml")
    config = replace(config, method=config.method.for_deployment())
    config.method.check(len(NAMES))
    source = SourceSettings(name, path=str(HOSPITALS / "data" / f"{name}.jsonl"), columns=COLUMNS.get(name, {}))
    (shard,) = load_federation(replace(config.data, source=(source,)), ROOT).shards
    rows = {split: len(getattr(shard, split)) for split in SPLITS}
    enforce([*settings_checks(config, source, policy, None), *row_checks(config, rows, policy)])
    with pytest.raises(PolicyError, match="embedding split"):
        enforce(row_checks(config, rows, PolicySettings()))
    assert "--policy" in SCRIPT.read_text()


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_the_script_is_one() -> None:
    assert SCRIPT.stat().st_mode & 0o100, "it can be started"
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
