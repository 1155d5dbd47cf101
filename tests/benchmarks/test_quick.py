"""The benchmarks run and write their ratios; how large those are is for docs/performance.md, never for a test."""

import ast
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training import alone

from fedamole.federation.settings import TrainingSettings
from fedamole.model.amole import AdapterSpec
from fedamole.model.bank import Bank
from fedamole.model.params import Adapter, new_shared

FOLDER = Path(__file__).parents[2] / "benchmarks"
LONG = ("deployment", "growth", "serving")
"""Those that start many processes, which takes more than 20 seconds."""
SCRIPTS = ("assignment", "deployment", "growth", "layer", "methods", "round", "scoring", "secure", "serving", "traffic")
each_script = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in LONG else ()) for name in SCRIPTS]
)


def run(name: str, *options: str) -> str:
    command = [sys.executable, str(FOLDER / f"{name}.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def ratios_in(file: Path) -> dict[str, float]:
    """The ratios that a benchmark wrote, each a finite number above 0."""
    result: dict[str, Any] = json.loads(file.read_text())["ratios"]
    assert result
    assert all(math.isfinite(value) and value > 0 for value in result.values()), result
    return result


def test_every_benchmark_is_known_here() -> None:
    shared = {"measure", "bases", "all"}
    assert {path.stem for path in FOLDER.glob("*.py")} - shared == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_help_says_what_the_target_is(name: str) -> None:
    """The help is the docstring; that --quick and --json are understood is seen where they are used, below."""
    assert "Target" in (ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())) or "")


def test_help_teaches() -> None:
    text = run("layer", "--help")
    assert "--quick" in text
    assert "--json" in text
    assert "Targets: at most" in text


@each_script
def test_quick_prints_a_table_and_writes_its_ratios(name: str, tmp_path: Path) -> None:
    file = tmp_path / "ratios.json"
    assert "━" in run(name, "--quick", "--json", str(file))
    ratios = ratios_in(file)
    # Bytes are counted, not timed: that nothing needless travels is a promise that a test can hold.
    assert all(value <= 1.01 for key, value in ratios.items() if name == "traffic" and "_vs_minimum_" in key)
    if name == "round":  # docs/performance.md compares with each of them
        opponents = {key.split("_vs_")[1].split("_at_")[0] for key in ratios}
        assert opponents == {"sequential", "processes", "peft_loop"}


def test_the_base_that_a_gpu_is_measured_with_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--base llama-1b`, the default on a GPU, in the same calls with smaller numbers."""
    monkeypatch.syspath_prepend(FOLDER)
    import bases

    small = {
        "vocab_size": 2048,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    monkeypatch.setattr(bases, "LLAMA_1B", {**bases.LLAMA_1B, **small})
    base = bases.open_base("llama-1b")
    assert (base.name, base.width) == ("llama-1b", 32)
    assert set(base.shapes) == {f"model.layers.{n}.self_attn.{name}_proj" for n in (0, 1) for name in "qv"}
    adapter = Adapter(AdapterSpec(rank=2), new_shared(base.shapes, 2, torch.Generator().manual_seed(0)))
    assert alone(Bank(base), adapter, [((5, 6, 7), (8, 9))], TrainingSettings(local_steps=2)).steps == 2


def test_all_are_measured_once_and_a_second_run_resumes(tmp_path: Path) -> None:
    output = run("all", "--quick", "--out", str(tmp_path), "assignment")
    assert "assignment: " in output
    assert {path.name for path in tmp_path.iterdir()} == {"assignment.json", "assignment.txt"}
    ratios_in(tmp_path / "assignment.json")
    assert "━" in (tmp_path / "assignment.txt").read_text()
    assert "assignment: " not in run("all", "--quick", "--out", str(tmp_path), "assignment")


def test_every_script_is_among_all() -> None:
    tree = ast.parse((FOLDER / "all.py").read_text())
    (measured,) = [node.value for node in tree.body if isinstance(node, ast.AnnAssign) and node.value is not None]
    assert {arguments[0] for arguments in ast.literal_eval(measured).values()} == set(SCRIPTS)
