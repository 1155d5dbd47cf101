"""The benchmarks run and write their ratios; how large those are is for docs/performance.md, never for a test."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = ("assignment", "deployment", "growth", "layer", "round", "scoring", "serving", "traffic")


def run(name: str, *options: str) -> str:
    command = [sys.executable, str(FOLDER / f"{name}.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_benchmark_is_known_here() -> None:
    shared = {"measure", "bases"}
    assert {path.stem for path in FOLDER.glob("*.py")} - shared == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_teaches(name: str) -> None:
    text = run(name, "--help")
    assert "--quick" in text
    assert "--json" in text
    assert "Target" in text


@pytest.mark.parametrize("name", ["assignment", "traffic", pytest.param("deployment", marks=pytest.mark.faults)])
def test_quick_prints_a_table_and_writes_its_ratios(name: str, tmp_path: Path) -> None:
    file = tmp_path / "ratios.json"
    assert "━" in run(name, "--quick", "--json", str(file))
    ratios = json.loads(file.read_text())["ratios"]
    assert ratios
    assert all(math.isfinite(value) and value > 0 for value in ratios.values())
    # Bytes are counted, not timed: that nothing needless travels is a promise that a test can hold.
    assert all(value <= 1.01 for key, value in ratios.items() if name == "traffic" and "_vs_minimum_" in key)
