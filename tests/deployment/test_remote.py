"""The engine of a deployment over real clients, without a network: parity, lateness, faults, lies."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import small
from tests.deployment.direct import Town, town

TIMES = ("seconds", "peak_memory", "group", "bytes")


def facts(folder: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without times, sizes and the lines that a network adds; in one order."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(TIMES)} for line in lines]


def states(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "checkpoints").glob("*.safetensors"))}


@pytest.fixture
def settle(tiny: Path, tmp_path: Path) -> Any:
    def make(method: str, *overrides: str) -> Town:
        return town(tiny / "config.toml", tmp_path, *small(method), *overrides)

    return make


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("fedamole", []), ("fedit", ["evaluation.before_aggregation=true"]), ("fedlease", []), ("ifca_lora", []),
        ("flora", []), ("feddpa", []), ("fedamole", ["evaluation.select=score"]),
    ],
)  # fmt: skip
def test_equals_the_run_in_one_process(method: str, options: list[str], settle: Any, runs: Any) -> None:
    there = settle(method, *options)
    summary = there.run()
    here = runs(method, *options, "run.group=1")
    assert states(there.folder / "server-run") == states(here)
    assert facts(there.folder / "server-run") == facts(here)
    rows = json.loads((here / "summary.json").read_text())["rows"]
    assert summary["rows"] == rows
